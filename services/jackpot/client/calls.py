"""What both clients ask of the control plane's REST API, and what its answers mean. No connection is made here."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import ssl
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from jackpot.control_plane.jobs.records import JobDetail, JobList, JobRecord
from jackpot.errors import ApiError

DEFAULT_URL = "http://127.0.0.1:8700"
TIMEOUT_SECONDS = 30.0
ATTEMPTS = 5  # of a request that is safe to repeat, while the server restarts
RETRY_SECONDS = 0.5

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a job: ``state``, ``step``, ``evaluation``, ``alarm``, ``scale`` or ``end``."""

    name: str
    data: Mapping[str, Any]
    id: str | None


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request, and what its answer means. All requests here are safe to repeat."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None


def _job(response: httpx.Response) -> JobRecord:
    return JobRecord.model_validate_json(response.content)


def _object(response: httpx.Response) -> dict[str, Any]:
    content: dict[str, Any] = response.json()
    return content


def submit(
    job: Mapping[str, Any], priority: int, labels: Mapping[str, str], idempotency_key: str | None
) -> Call[JobRecord]:
    """Start a job."""
    # A key even if the caller has none: a request that is repeated because its answer was lost makes no second job.
    headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key or secrets.token_hex(16)}
    params = {"priority": priority, "label": [f"{key}={value}" for key, value in labels.items()]}
    return Call("POST", "/v1/jobs", _job, params, headers, json.dumps(job).encode())


def check(job: Mapping[str, Any]) -> Call[dict[str, Any]]:
    """Check a job, start nothing."""
    headers = {"Content-Type": "application/json"}
    return Call("POST", "/v1/jobs", _object, {"dry_run": True}, headers, json.dumps(job).encode())


def page(states: Sequence[str], labels: Mapping[str, str], limit: int, cursor: str | None) -> Call[JobList]:
    """A page of the list of jobs."""
    params: dict[str, Any] = {"limit": limit, "label": [f"{key}={value}" for key, value in labels.items()]}
    params |= {"state": list(states)} | ({"cursor": cursor} if cursor else {})
    return Call("GET", "/v1/jobs", lambda response: JobList.model_validate_json(response.content), params)


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


def get(job_id: str, what: str, **params: Any) -> Call[dict[str, Any]]:
    """Something else of a job."""
    return Call("GET", f"{path_of(job_id)}/{what}", _object, params)


def path_of(job_id: str) -> str:
    """The path of a job."""
    return f"/v1/jobs/{quote(job_id, safe='')}"


class Settings:
    """Where the server is and how it is spoken to: as the client is told, or the environment says."""

    def __init__(self, url: str | None, token: str | None, ca: Path | None) -> None:
        self.url = (url or os.environ.get("JACKPOT_URL") or DEFAULT_URL).rstrip("/")
        token = token or os.environ.get("JACKPOT_TOKEN")
        self.arguments: dict[str, Any] = {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {token}"} if token else {},
            "timeout": TIMEOUT_SECONDS,
            "verify": ssl.create_default_context(cafile=str(ca)) if ca else True,
            # A proxy for the way out has no business between this machine and itself.
            "trust_env": not self.url.startswith(("http://127.0.0.1", "http://localhost", "http://[::1]")),
        }

    def unreachable(self, error: Exception) -> ApiError:
        """What is said if nobody answers."""
        return ApiError(f"{self.url} does not answer ({error}). Is `jackpot serve` running there? Set JACKPOT_URL.")


def raise_for(response: httpx.Response) -> None:
    """Turn a problem document into an error that says what it says."""
    if response.status_code < 400:
        return
    try:
        problem = dict(response.json())
    except ValueError:
        problem = {}
    lines = [str(problem.get("detail") or f"the server answered {response.status_code}")]
    errors = problem.get("errors") or []
    if errors:
        lines = [
            f"{one['field']}{' = ' + repr(one['value']) if one.get('value') else ''}: {one['problem']}. {one['remedy']}"
            for one in errors
        ]
    raise ApiError("\n".join(lines), response.status_code, problem)


class EventReader:
    """Lines of an event stream → events."""

    def __init__(self) -> None:
        self.last_id: str | None = None
        self._fields: dict[str, str] = {}

    def feed(self, line: str) -> Event | None:
        """Take up a line; the event that it ends, if it does."""
        if line:
            name, _, value = line.partition(":")
            if name:
                self._fields[name] = value.removeprefix(" ")
            return None
        fields, self._fields = self._fields, {}
        if "data" not in fields:
            return None
        self.last_id = fields.get("id", self.last_id)
        return Event(fields.get("event", "message"), json.loads(fields["data"]), fields.get("id"))


def unpack(chunks: Iterator[bytes], directory: Path) -> Path:
    """Unpack an archive beside ``directory`` and rename what it holds, so that a directory of that name is whole."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        archive = aside / "archive.tar"
        with archive.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
        with tarfile.open(archive, "r:") as tar:
            tar.extractall(aside / "content", filter="data")
        (inner,) = (aside / "content").iterdir()
        inner.rename(directory)
    except (tarfile.TarError, ValueError) as error:
        raise ApiError(f"the archive cannot be unpacked ({error}); try again") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return directory
