"""Routes: submit, list, look at, cancel, resume, scale and delete jobs."""

from __future__ import annotations

import json
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response

from jackpot.config import JobSpec
from jackpot.control_plane.api import intake
from jackpot.control_plane.api.access import Admin, Behind, JobId, Reader, Writer
from jackpot.control_plane.api.problems import ProblemError
from jackpot.control_plane.backend import Backend
from jackpot.control_plane.jobs.job_store import IdempotencyKey
from jackpot.control_plane.jobs.records import (
    MAX_PRIORITY,
    DryRun,
    JobDetail,
    JobList,
    JobRecord,
    Record,
    ScaleRequest,
    new_job_id,
    now,
)
from jackpot.control_plane.jobs.states import JobState
from jackpot.control_plane.sessions.scaling import rollout_replicas

MAX_PAGE = 200

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.post(
    "",
    status_code=201,
    response_model=JobRecord,
    responses={200: {"description": "A dry run, or the job of this Idempotency-Key", "model": DryRun | JobRecord}},
    openapi_extra={"requestBody": {"required": True, "content": {}}},  # filled in with the OpenAPI document
)
async def submit(
    request: Request,
    token: Writer,
    backend: Behind,
    dry_run: Annotated[bool, Query(description="Check the job, and start nothing.")] = False,
    priority: Annotated[int, Query(ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="Greater starts earlier.")] = 0,
    label: Annotated[list[str] | None, Query(description="key=value; may be given several times.")] = None,
    idempotency_key: Annotated[
        str | None,
        Header(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$", description="Repeating makes no second job."),
    ] = None,
) -> Response:
    """Submit a job file, as JSON or YAML. It is queued, and starts when a slot is free."""
    labels = intake.read_labels(label or [])
    content_type = request.headers.get("content-type", "")
    job = await intake.read_job(await request.body(), content_type, backend.settings.admission)
    if dry_run:
        notes = await intake.check_thoroughly(job)
        return _json(DryRun(valid=True, spec=job.model_dump(mode="json"), notes=notes))
    record = _new_record(job, priority, labels, token.name if token else None)
    key = None
    if idempotency_key is not None:
        owner = token.id if token else "local"
        key = IdempotencyKey(owner, idempotency_key, intake.fingerprint(job, priority, labels))
    record, is_new = await backend.store.create(record, job.model_dump_json().encode(), key)
    backend.scheduler.wake()
    headers = {"Location": f"/v1/jobs/{record.id}"} | ({} if is_new else {"Idempotency-Replayed": "true"})
    return _json(record, 201 if is_new else 200, headers)


@router.get("", response_model=JobList)
async def list_jobs(
    _: Reader,
    backend: Behind,
    state: Annotated[list[JobState] | None, Query(description="Only these states.")] = None,
    label: Annotated[list[str] | None, Query(description="Only with all these labels, key=value.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most jobs on the page.")] = 50,
    cursor: Annotated[
        str | None, Query(pattern=r"^[0-9]{1,15}$", description="next_cursor of the page before.")
    ] = None,
) -> Response:
    """The jobs, newest first."""
    labels = intake.read_labels(label or [])
    start = None if cursor is None else int(cursor)
    page = await backend.store.page(frozenset(state or ()), labels, start, limit)
    # Records are sent as stored; only running jobs get fresh progress.
    active = backend.scheduler.progress
    records = [
        _current(JobRecord.model_validate_json(data), backend).model_dump_json().encode() if job_id in active else data
        for job_id, data in page.records.items()
    ]
    following = b"null" if page.next_cursor is None else b'"%d"' % page.next_cursor
    content = b'{"jobs":[' + b",".join(records) + b'],"next_cursor":' + following + b"}"
    return Response(content, media_type="application/json")


@router.get("/{job_id}", response_model=JobDetail)
async def get_job(job_id: JobId, _: Reader, backend: Behind) -> Response:
    """A job: its state, its history, its job file as resolved."""
    return _json(await _detail(await backend.store.get(job_id), backend))


@router.post("/{job_id}:cancel", response_model=JobRecord)
async def cancel(job_id: JobId, token: Writer, backend: Behind) -> Response:
    """Stop a job. Its processes finish their unit of work; a checkpoint stays. Repeating has no effect."""
    who = f" by {token.name}" if token else ""
    return _json(_current(await backend.scheduler.cancel(job_id, f"cancelled on request{who}"), backend))


@router.post("/{job_id}:resume", response_model=JobRecord)
async def resume(job_id: JobId, token: Writer, backend: Behind) -> Response:
    """Queue a failed or cancelled job again. It goes on from its last checkpoint."""
    who = f" by {token.name}" if token else ""
    return _json(_current(await backend.scheduler.resume(job_id, f"resumed on request{who}"), backend))


@router.post("/{job_id}:scale", response_model=JobDetail)
async def scale(job_id: JobId, wanted: ScaleRequest, _: Writer, backend: Behind) -> Response:
    """Change how many rollout replicas a running job has. New ones sample as soon as they are ready; those that leave
    finish what they have under way. Repeating has no effect."""
    record = await backend.scheduler.scale(job_id, wanted.rollout_replicas)
    return _json(await _detail(record, backend))


@router.delete("/{job_id}", status_code=204, response_class=Response)
async def delete(job_id: JobId, _: Admin, backend: Behind) -> Response:
    """Forget a finished job, with everything it has written: checkpoints and export, too."""
    await backend.scheduler.delete(job_id)
    return Response(status_code=204)


def _new_record(job: JobSpec, priority: int, labels: dict[str, str], owner: str | None) -> JobRecord:
    moment = now()
    return JobRecord(
        id=new_job_id(job.name),
        name=job.name,
        state=JobState.QUEUED,
        reason="submitted",
        priority=priority,
        labels=labels,
        owner=owner,
        created=moment,
        updated=moment,
        steps=job.learner.steps,
    )


async def _detail(record: JobRecord, backend: Backend) -> JobDetail:
    spec = json.loads(await backend.store.spec(record.id))
    replicas = rollout_replicas(backend.scheduler.run_dir(record.id), spec["rollout"]["replicas"])
    transitions = await backend.store.transitions(record.id)
    return JobDetail(**dict(_current(record, backend)), spec=spec, rollout_replicas=replicas, transitions=transitions)


def _current(record: JobRecord, backend: Backend) -> JobRecord:
    progress = backend.scheduler.progress.get(record.id)
    return record if progress is None else record.model_copy(update={"progress": progress})


def _json(content: Record, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    try:
        return Response(content.model_dump_json(), status, headers, "application/json")
    except ValueError as error:
        raise ProblemError(422, "invalid-job", f"The job holds what JSON cannot: {error}") from None
