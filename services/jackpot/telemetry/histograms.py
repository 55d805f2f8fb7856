"""A histogram that records a whole batch at once; the client library's own takes one value at a time, under a lock."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

from jackpot.telemetry.catalogue import MetricSpec


class BatchHistogram(Collector):
    """A histogram of one job. Exported once it has recorded a batch.

    Args:
        spec: its entry in the catalogue.
        job_id: label of its only series.
        registry: where it registers itself.
    """

    def __init__(self, spec: MetricSpec, job_id: str, registry: CollectorRegistry) -> None:
        self._spec = spec
        self._job_id = job_id
        self._bounds = np.asarray(spec.buckets, dtype=np.float64)
        self._counts = np.zeros(len(spec.buckets) + 1, dtype=np.int64)
        self._sum = 0.0
        self._lock = threading.Lock()
        registry.register(self)

    def observe(self, values: ArrayLike) -> None:
        """Record a batch; values that are not finite are left out.

        Args:
            values: [n].
        """
        batch: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
        batch = batch[np.isfinite(batch)]
        # A value equal to a bound belongs to the bucket below it: `le` means ≤.
        counts = np.bincount(np.searchsorted(self._bounds, batch, side="left"), minlength=len(self._counts))
        with self._lock:
            self._counts += counts
            self._sum += float(batch.sum())

    def collect(self) -> Iterable[Metric]:
        """Part of the client library's interface."""
        with self._lock:
            cumulative, total = np.cumsum(self._counts), self._sum
        family = HistogramMetricFamily(self._spec.name, self._spec.description, labels=("job_id",))
        if cumulative[-1]:
            bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
            family.add_metric((self._job_id,), list(zip(bounds, cumulative.tolist(), strict=True)), total)
        return [family]

    def describe(self) -> Iterable[Metric]:
        """Part of the client library's interface."""
        return [HistogramMetricFamily(self._spec.name, self._spec.description, labels=("job_id",))]
