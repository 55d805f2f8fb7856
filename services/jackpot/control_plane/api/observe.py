"""Routes: follow a job. Events, series, logs, checkpoints, ledger, samples."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query
from pydantic import Field
from starlette.responses import StreamingResponse

from jackpot.control_plane.api.access import Behind, JobId, Reader
from jackpot.control_plane.api.problems import ProblemError
from jackpot.control_plane.api.streams import CURSOR_PATTERN, EventCursor, EventStream, follow_logs
from jackpot.control_plane.backend import Backend
from jackpot.control_plane.jobs.records import Record
from jackpot.control_plane.observing import archive, observation
from jackpot.storage.run_directory import RunFiles
from jackpot.storage.run_records import read_summary
from jackpot.trajectory import Role

MAX_STREAMS = 256
MAX_POINTS = 5000

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["following"])


class Series(Record):
    """A curve."""

    x: list[float]
    """Optimizer steps; for bus/… and the services' throughput seconds since the job's first start."""
    y: list[float | None]
    """Values; null where there is no finite one."""


class MetricsAnswer(Record):
    """Curves by name."""

    series: dict[str, Series]
    """The columns of metrics.jsonl; evaluation/… of evaluations.jsonl; bus/… and throughput/… of the services."""


class LedgerAnswer(Record):
    """How the job's groups ended. Once a session has ended: dispatched = trained + dropped + open."""

    trained: int
    """Groups trained on."""
    dropped: dict[str, int]
    """Groups dropped, by reason."""
    ended: int
    """Groups that ended either way."""
    dispatched: int | None
    """Groups ever dispatched, by the bus's own count; null until a session has ended."""
    open: int | None
    """Groups that had not ended when the session did."""
    entries: list[dict[str, Any]]
    """The newest entries, newest first."""


class Checkpoint(Record):
    """What can be downloaded."""

    name: str
    """The checkpoint's name; ``export`` is the final model."""
    step: int | None
    """After which optimizer step; null for the export."""
    roles: dict[str, int]
    """Models in it, with the bytes of their weights."""
    latest: bool
    """Whether training would go on from it."""
    time: float = Field(description="When it was written, in Unix seconds.")


class CheckpointsAnswer(Record):
    """The checkpoints that are kept, oldest first."""

    checkpoints: list[Checkpoint]
    """The checkpoints."""


class SamplesAnswer(Record):
    """Sample trajectories, newest first."""

    samples: list[dict[str, Any]]
    """Each with its prompt, its reward and its tokens: text, acceptance probability, whether accepted."""


class ServicesAnswer(Record):
    """The processes that have a log."""

    services: list[str]
    """Their names."""


_EVENT = {
    "type": "object",
    "description": "One event of the stream; data is JSON.",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["state", "step", "evaluation", "alarm", "scale", "end"]},
        "id": {"type": "string", "pattern": CURSOR_PATTERN},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": _EVENT}}, "description": "Events"}
}
_TEXT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Lines"}
}
_TAR: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}},
        "description": "A Hugging Face directory",
    }
}


@router.get("/events", response_class=StreamingResponse, responses=_STREAM)
async def events(
    job_id: JobId,
    _: Reader,
    backend: Behind,
    last_event_id: Annotated[
        str | None, Header(pattern=CURSOR_PATTERN, description="Go on behind this event; without it, from the start.")
    ] = None,
) -> StreamingResponse:
    """The job's events as they happen: `state`, `step`, `evaluation`, `alarm`; `end` when it is over."""
    await backend.store.get(job_id)
    _check_streams(backend)
    stream = EventStream(backend, job_id, EventCursor.parse(last_event_id))
    return StreamingResponse(_counted(stream.events(), backend), media_type="text/event-stream")


@router.get("/metrics", response_model=MetricsAnswer)
async def metrics(
    job_id: JobId,
    _: Reader,
    backend: Behind,
    name: Annotated[list[str] | None, Query(description="Only these curves.", examples=["reward/mean"])] = None,
    points: Annotated[int, Query(ge=1, le=MAX_POINTS, description="Most points of one curve.")] = 300,
) -> dict[str, Any]:
    """The job's curves, thinned out for plotting."""
    await backend.store.get(job_id)
    run_dir = backend.scheduler.run_dir(job_id)
    return {"series": await asyncio.to_thread(observation.series, run_dir, frozenset(name or ()), points)}


@router.get("/services", response_model=ServicesAnswer)
async def services(job_id: JobId, _: Reader, backend: Behind) -> dict[str, Any]:
    """The processes whose logs can be read."""
    await backend.store.get(job_id)
    return {"services": observation.services(backend.scheduler.run_dir(job_id))}


@router.get("/logs", response_class=StreamingResponse, responses=_TEXT)
async def logs(
    job_id: JobId,
    _: Reader,
    backend: Behind,
    service: Annotated[
        str | None, Query(pattern=observation.SERVICE_PATTERN, description="One process; all without it.")
    ] = None,
    follow: Annotated[bool, Query(description="Keep sending until the job is over.")] = False,
    tail: Annotated[int, Query(ge=0, le=10_000, description="Begin with this many lines of each log.")] = 200,
) -> StreamingResponse:
    """The logs of the job's processes, as plain text, passwords removed."""
    await backend.store.get(job_id)
    if service is not None:
        observation.log_path(backend.scheduler.run_dir(job_id), service)
    _check_streams(backend)
    lines = follow_logs(backend, job_id, service, tail, follow)
    return StreamingResponse(_counted(lines, backend), media_type="text/plain; charset=utf-8")


@router.get("/checkpoints", response_model=CheckpointsAnswer)
async def checkpoints(job_id: JobId, _: Reader, backend: Behind) -> dict[str, Any]:
    """The checkpoints that are kept, and the export once the job has succeeded."""
    await backend.store.get(job_id)
    return {"checkpoints": await asyncio.to_thread(archive.checkpoints, backend.scheduler.run_dir(job_id))}


@router.get("/checkpoints/{name}", response_class=StreamingResponse, responses=_TAR)
async def download(
    job_id: JobId,
    name: Annotated[
        str, Path(pattern=archive.NAME_PATTERN, description="As in the list; or `latest`.", examples=["export"])
    ],
    _: Reader,
    backend: Behind,
    role: Annotated[Role, Query(description="Which model of it.")] = "policy",
) -> StreamingResponse:
    """One model of a checkpoint as a tar archive of a Hugging Face directory."""
    await backend.store.get(job_id)
    prefix = f"{job_id}-{name}-{role}"
    packed = await asyncio.to_thread(archive.Archive, backend.scheduler.run_dir(job_id), name, role, prefix)
    headers = {"Content-Length": str(packed.size), "Content-Disposition": f'attachment; filename="{prefix}.tar"'}
    return StreamingResponse(packed.chunks(), media_type="application/x-tar", headers=headers)


@router.get("/ledger", response_model=LedgerAnswer)
async def ledger(
    job_id: JobId,
    _: Reader,
    backend: Behind,
    entries: Annotated[int, Query(ge=0, le=1000, description="How many entries to list.")] = 0,
) -> dict[str, Any]:
    """How the job's groups ended."""
    record = await backend.store.get(job_id)
    run_dir = backend.scheduler.run_dir(job_id)
    summary = read_summary(RunFiles(run_dir)) if record.state.finished else None
    return await asyncio.to_thread(observation.ledger, run_dir, summary, entries)


@router.get("/samples", response_model=SamplesAnswer)
async def samples(
    job_id: JobId,
    _: Reader,
    backend: Behind,
    limit: Annotated[int, Query(ge=1, le=100, description="Most samples.")] = 10,
) -> dict[str, Any]:
    """Sample trajectories with the acceptance probability of each token."""
    await backend.store.get(job_id)
    return {"samples": await asyncio.to_thread(observation.samples, backend.scheduler.run_dir(job_id), limit)}


async def _counted(stream: AsyncIterator[str], backend: Backend) -> AsyncIterator[str]:
    backend.metrics.stream_opened()
    try:
        async for text in stream:
            yield text
    finally:
        backend.metrics.stream_closed()


def _check_streams(backend: Backend) -> None:
    if backend.metrics.open_streams >= MAX_STREAMS:
        detail = f"{MAX_STREAMS} streams are open already. Wait until one ends."
        raise ProblemError(503, "too-many-streams", detail, headers={"Retry-After": "5"})
