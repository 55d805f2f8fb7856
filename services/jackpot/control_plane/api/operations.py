"""Routes for operators (health, metrics, scrape targets), and the schema of the job file."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from jackpot.config import job_json_schema
from jackpot.control_plane.api.access import Behind, Reader
from jackpot.control_plane.api.problems import ProblemError
from jackpot.control_plane.jobs.records import Record
from jackpot.control_plane.jobs.states import JobState
from jackpot.telemetry.scrape_targets import read_targets

router = APIRouter(tags=["operations"])


class Health(Record):
    """The server is up."""

    status: str
    """Always ``ok``; anything else is a problem document."""


@router.get("/healthz", response_model=Health)
async def healthz() -> dict[str, str]:
    """Whether the server is up."""
    return {"status": "ok"}


@router.get("/readyz", response_model=Health)
async def readyz(backend: Behind) -> dict[str, str]:
    """Whether the server accepts jobs and its scheduler runs."""
    problem = await backend.readiness()
    if problem is not None:
        raise ProblemError(503, "not-ready", f"Not ready: {problem}. Try again.", headers={"Retry-After": "2"})
    return {"status": "ok"}


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus's format"}},
)
async def metrics(_: Reader, backend: Behind) -> Response:
    """The server's own metrics, for Prometheus."""
    return Response(backend.metrics.render(await backend.store.counts()), media_type="text/plain; version=0.0.4")


class ScrapeGroup(Record):
    """Processes to scrape, as Prometheus's ``http_sd_configs`` reads them."""

    targets: list[str]
    """``host:port`` that serves /metrics."""
    labels: dict[str, str]
    """``job_id``, ``service`` and ``instance``."""


@router.get("/v1/metrics-targets", response_model=list[ScrapeGroup])
async def metrics_targets(_: Reader, backend: Behind) -> list[dict[str, Any]]:
    """The processes of running jobs that the server's own launcher has started, for Prometheus's HTTP service
    discovery. They listen on loopback, or on all interfaces if the server runs with ``JACKPOT_METRICS_HOST``, the
    name by which other hosts reach it. On Kubernetes a PodMonitor finds the processes instead."""
    running = await backend.store.in_states(JobState.STARTING, JobState.RUNNING, JobState.STOPPING)
    return [group for record in running for group in read_targets(backend.scheduler.run_dir(record.id))]


@router.get("/v1/schema")
async def schema() -> dict[str, Any]:
    """The JSON Schema of the job file."""
    return job_json_schema()
