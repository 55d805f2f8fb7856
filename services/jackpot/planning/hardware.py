"""The plan's assumptions about hardware: vendors' data sheets, and the fraction of them that programs reach."""

from __future__ import annotations

from dataclasses import dataclass

from jackpot.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Gpu:
    """One accelerator. Rates per second, dense (without sparsity)."""

    flops: float  # in 16 bits, on tensor cores
    bandwidth: float  # bytes of memory
    memory: float  # bytes


GPUS = {
    "a100": Gpu(312e12, 2.04e12, 80e9),
    "l40s": Gpu(362e12, 0.864e12, 48e9),
    "h100": Gpu(989e12, 3.35e12, 80e9),
    "h200": Gpu(989e12, 4.8e12, 141e9),
    "b200": Gpu(2250e12, 8.0e12, 180e9),
}
"""By name."""


@dataclass(frozen=True, slots=True)
class Utilization:
    """The achieved fraction of the data sheet: round figures from public reports of well-tuned systems."""

    training: float = 0.4  # of the arithmetic, forward and backward
    scoring: float = 0.5  # of the arithmetic, forward only
    decoding: float = 0.7  # of the memory's bandwidth


def gpu_named(name: str) -> Gpu:
    """The GPU called ``name``.

    Raises:
        ConfigError: there is no such GPU in the table.
    """
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise ConfigError("--gpu", name, "is not known", f"Use one of {', '.join(GPUS)}.") from None
