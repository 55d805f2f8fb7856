"""Utilization of this process's GPUs, read from NVML at each scrape; nothing runs in between."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from jackpot.telemetry.catalogue import CATALOGUE

LOG = logging.getLogger(__name__)


class GpuCollector(Collector):
    """Utilization and memory of the GPUs in ``CUDA_VISIBLE_DEVICES``, or of all.

    Without the package ``nvidia-ml-py``, a driver or a GPU there are no figures.

    Args:
        job_id: label of every series.
        registry: where it registers itself.
    """

    NAMES = ("jackpot_gpu_busy_ratio", "jackpot_gpu_memory_used_bytes", "jackpot_gpu_memory_size_bytes")

    def __init__(self, job_id: str, registry: CollectorRegistry) -> None:
        self._job_id = job_id
        self._nvml: Any = None
        self._handles: Sequence[tuple[str, Any]] | None = None  # None: not read yet
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """Part of the client library's interface."""
        families = [_family(name) for name in self.NAMES]
        if self._handles is None:
            self._handles = self._open()
        for index, handle in self._handles:
            try:
                busy = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            except self._nvml.NVMLError:
                continue  # such as a GPU in MIG mode, which has no utilization of its own
            for family, value in zip(families, (busy, memory.used, memory.total), strict=True):
                family.add_metric((self._job_id, index), value)
        return families

    def describe(self) -> Iterable[Metric]:
        """Part of the client library's interface."""
        return [_family(name) for name in self.NAMES]

    def _open(self) -> Sequence[tuple[str, Any]]:
        try:
            import pynvml
        except ImportError:
            return ()
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            return [(name, self._handle(name)) for name in visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), count)]
        except pynvml.NVMLError as error:
            LOG.info("no GPU metrics: %s", error)
            return ()

    def _handle(self, name: str) -> Any:
        by_index = name.isdecimal()
        return (
            self._nvml.nvmlDeviceGetHandleByIndex(int(name)) if by_index else self._nvml.nvmlDeviceGetHandleByUUID(name)
        )


def visible_gpus(variable: str | None, count: int) -> Sequence[str]:
    """Indices or UUIDs of the GPUs that a process may use.

    Args:
        variable: ``CUDA_VISIBLE_DEVICES``, or None where it is not set.
        count: how many there are.
    """
    if variable is None:
        return [str(index) for index in range(count)]
    names = [name.strip() for name in variable.split(",")]
    # CUDA's rule: everything after the first name that is not a device is invisible.
    valid: list[str] = []
    for name in names:
        if not (name.startswith(("GPU-", "MIG-")) or (name.isdecimal() and int(name) < count)):
            break
        valid.append(name)
    return valid


def _family(name: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, CATALOGUE[name].description, labels=("job_id", "gpu"))
