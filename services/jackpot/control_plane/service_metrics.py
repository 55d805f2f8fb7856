"""The control plane's own metrics. Those of a job's processes have their home in ``jackpot.runtime.metrics``."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from jackpot.control_plane.jobs.states import JobState

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class ServiceMetrics:
    """Requests and jobs, as Prometheus sees them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "jackpot_api_requests", "Requests answered", ("method", "route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "jackpot_api_request_duration_seconds",
            "Time to answer a request, to its last byte",
            ("method", "route"),
            buckets=BUCKETS,
            registry=self._registry,
        )
        self._jobs = Gauge("jackpot_jobs", "Jobs by state", ("state",), registry=self._registry)
        self._streams = Gauge("jackpot_api_open_streams", "Event and log streams open", registry=self._registry)

        self.open_streams = 0

    def stream_opened(self) -> None:
        """Count a stream of events or logs that begins."""
        self.open_streams += 1
        self._streams.set(self.open_streams)

    def stream_closed(self) -> None:
        """Count a stream that has ended."""
        self.open_streams -= 1
        self._streams.set(self.open_streams)

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request; ``route`` is the pattern, so that ids make no labels."""
        known = method if method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS") else "other"
        self._requests.labels(known, route, str(status)).inc()
        self._seconds.labels(known, route).observe(seconds)

    def render(self, counts: Mapping[JobState, int]) -> bytes:
        """The text that Prometheus reads."""
        for state, count in counts.items():
            self._jobs.labels(state.value).set(count)
        return generate_latest(self._registry)
