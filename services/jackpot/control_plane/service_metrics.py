"""The control plane's own metrics. Metrics of a job's processes are in ``jackpot.telemetry``."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest

from jackpot.control_plane.jobs.states import JobState
from jackpot.telemetry import MetricSpec

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")

CONTROL_PLANE = ("control-plane",)
_SPECS = (
    MetricSpec("jackpot_control_plane", "info", "What is running; always 1", ("python", "version"), CONTROL_PLANE),
    MetricSpec("jackpot_jobs", "gauge", "Jobs by state", ("state",), CONTROL_PLANE),
    MetricSpec("jackpot_api_requests", "counter", "Requests answered", ("method", "route", "status"), CONTROL_PLANE),
    MetricSpec(
        "jackpot_api_request_duration_seconds",
        "histogram",
        "Time to answer a request, to its last byte",
        ("method", "route"),
        CONTROL_PLANE,
        BUCKETS,
    ),
    MetricSpec("jackpot_api_requests_in_flight", "gauge", "Requests being answered", (), CONTROL_PLANE),
    MetricSpec("jackpot_api_open_streams", "gauge", "Event and log streams open", (), CONTROL_PLANE),
)
CATALOGUE: Mapping[str, MetricSpec] = {spec.name: spec for spec in _SPECS}
"""Every metric of the control plane, by name. They belong to no single job, so that none has the label ``job_id``."""


class ServiceMetrics:
    """Requests and jobs, as Prometheus sees them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        build = CATALOGUE["jackpot_control_plane"]
        Info(build.name, build.description, registry=self._registry).info(
            {"version": version("jackpot"), "python": platform.python_version()}
        )
        requests, seconds = CATALOGUE["jackpot_api_requests"], CATALOGUE["jackpot_api_request_duration_seconds"]
        self._requests = Counter(requests.name, requests.description, requests.labels, registry=self._registry)
        self._seconds = Histogram(
            seconds.name, seconds.description, seconds.labels, buckets=seconds.buckets, registry=self._registry
        )
        self._jobs, self._in_flight, self._streams = (
            Gauge(name, CATALOGUE[name].description, CATALOGUE[name].labels, registry=self._registry)
            for name in ("jackpot_jobs", "jackpot_api_requests_in_flight", "jackpot_api_open_streams")
        )
        self.open_streams = 0

    def stream_opened(self) -> None:
        """Count the start of a stream of events or logs."""
        self.open_streams += 1
        self._streams.set(self.open_streams)

    def stream_closed(self) -> None:
        """Count the end of a stream."""
        self.open_streams -= 1
        self._streams.set(self.open_streams)

    def request_began(self) -> None:
        """Count the start of a request; follow with :meth:`count_request`."""
        self._in_flight.inc()

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answered request; ``route`` is the pattern, so that ids do not become labels."""
        self._in_flight.dec()
        known = method if method in METHODS else "other"
        self._requests.labels(known, route, str(status)).inc()
        self._seconds.labels(known, route).observe(seconds)

    def render(self, counts: Mapping[JobState, int]) -> bytes:
        """The text that Prometheus reads."""
        for state, count in counts.items():
            self._jobs.labels(state.value).set(count)
        return generate_latest(self._registry)
