"""The requests of both clients to the control plane's REST API, and how answers are parsed. No connections here."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from jackpot.control_plane.jobs.records import JobDetail, JobList, JobRecord

JOBS_PER_PAGE = 100

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request, and how its answer is parsed. All requests here are safe to repeat."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None


@dataclass(frozen=True, slots=True)
class Stream:
    """A request whose answer is read piece by piece."""

    path: str
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    may_be_silent: bool = False  # for any time


def _job(response: httpx.Response) -> JobRecord:
    return JobRecord.model_validate_json(response.content)


def _object(response: httpx.Response) -> dict[str, Any]:
    content: dict[str, Any] = response.json()
    return content


def submit(
    job: Mapping[str, Any], priority: int, labels: Mapping[str, str], idempotency_key: str | None
) -> Call[JobRecord]:
    """Start a job."""
    # A key even without one from the caller: a request repeated after a lost answer must not make a second job.
    headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key or secrets.token_hex(16)}
    params = {"priority": priority, "label": [f"{key}={value}" for key, value in labels.items()]}
    return Call("POST", "/v1/jobs", _job, params, headers, json.dumps(job).encode())


def check(job: Mapping[str, Any]) -> Call[dict[str, Any]]:
    """Check a job without starting it."""
    headers = {"Content-Type": "application/json"}
    return Call("POST", "/v1/jobs", _object, {"dry_run": True}, headers, json.dumps(job).encode())


def page(states: Sequence[str], labels: Mapping[str, str]) -> Call[JobList]:
    """The first page of the list of jobs."""
    params = {"limit": JOBS_PER_PAGE, "label": [f"{key}={value}" for key, value in labels.items()], "state": [*states]}
    return Call("GET", "/v1/jobs", lambda response: JobList.model_validate_json(response.content), params)


def page_after(call: Call[JobList], answer: JobList) -> Call[JobList] | None:
    """The page that follows one; None after the last."""
    if answer.next_cursor is None:
        return None
    return replace(call, params={**call.params, "cursor": answer.next_cursor})


def detail(job_id: str) -> Call[JobDetail]:
    """One job."""
    return Call("GET", path_of(job_id), lambda response: JobDetail.model_validate_json(response.content))


def act(job_id: str, action: str) -> Call[JobRecord]:
    """Cancel or resume a job."""
    return Call("POST", f"{path_of(job_id)}:{action}", _job)


def scale(job_id: str, rollout_replicas: int) -> Call[JobDetail]:
    """Change how many rollout replicas a job has."""
    headers = {"Content-Type": "application/json"}
    content = json.dumps({"rollout_replicas": rollout_replicas}).encode()
    return replace(detail(job_id), method="POST", path=f"{path_of(job_id)}:scale", headers=headers, content=content)


def delete(job_id: str) -> Call[None]:
    """Delete a job."""
    return Call("DELETE", path_of(job_id), lambda response: None)


def metrics(job_id: str, names: Sequence[str], points: int) -> Call[dict[str, Any]]:
    """Points of the series of a job, by name."""
    params = {"name": list(names), "points": points}
    return Call("GET", f"{path_of(job_id)}/metrics", lambda response: dict(response.json()["series"]), params)


def ledger(job_id: str, entries: int) -> Call[dict[str, Any]]:
    """How a job's groups ended."""
    return Call("GET", f"{path_of(job_id)}/ledger", _object, {"entries": entries})


def checkpoints(job_id: str) -> Call[list[dict[str, Any]]]:
    """The checkpoints of a job that can be pulled."""
    return Call("GET", f"{path_of(job_id)}/checkpoints", lambda response: list(response.json()["checkpoints"]))


def samples(job_id: str, limit: int) -> Call[list[dict[str, Any]]]:
    """Sample trajectories of a job."""
    return Call(
        "GET", f"{path_of(job_id)}/samples", lambda response: list(response.json()["samples"]), {"limit": limit}
    )


def events(job_id: str, last_event_id: str | None) -> Stream:
    """The events of a job after one that is known."""
    return Stream(f"{path_of(job_id)}/events", headers={"Last-Event-ID": last_event_id} if last_event_id else {})


def logs(job_id: str, service: str | None, follow: bool, tail: int) -> Stream:
    """Lines of a job's logs."""
    params = {"follow": follow, "tail": tail} | ({"service": service} if service else {})
    return Stream(f"{path_of(job_id)}/logs", params, may_be_silent=follow)


def archive(job_id: str, name: str, role: str) -> Stream:
    """One model of a checkpoint, as a tar file."""
    return Stream(f"{path_of(job_id)}/checkpoints/{name}", {"role": role})


def path_of(job_id: str) -> str:
    """The path of a job."""
    return f"/v1/jobs/{quote(job_id, safe='')}"
