"""A client of the control plane's REST API: ``jackpot.Client``, and ``jackpot.AsyncClient`` with the same methods.

client = jackpot.Client()                    # JACKPOT_URL and JACKPOT_TOKEN, else http://127.0.0.1:8700
job = client.submit({"policy": …, …})
for event in client.events(job.id): …
client.pull(job.id, "export", Path("model"))
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import ssl
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
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
class _Call(Generic[T]):
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


def _submit(
    job: Mapping[str, Any], priority: int, labels: Mapping[str, str], idempotency_key: str | None
) -> _Call[JobRecord]:
    # A key even if the caller has none: a request that is repeated because its answer was lost makes no second job.
    headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key or secrets.token_hex(16)}
    params = {"priority": priority, "label": [f"{key}={value}" for key, value in labels.items()]}
    return _Call("POST", "/v1/jobs", _job, params, headers, json.dumps(job).encode())


def _check(job: Mapping[str, Any]) -> _Call[dict[str, Any]]:
    headers = {"Content-Type": "application/json"}
    return _Call("POST", "/v1/jobs", _object, {"dry_run": True}, headers, json.dumps(job).encode())


def _page(states: Sequence[str], labels: Mapping[str, str], limit: int, cursor: str | None) -> _Call[JobList]:
    params: dict[str, Any] = {"limit": limit, "label": [f"{key}={value}" for key, value in labels.items()]}
    params |= {"state": list(states)} | ({"cursor": cursor} if cursor else {})
    return _Call("GET", "/v1/jobs", lambda response: JobList.model_validate_json(response.content), params)


def _detail(job_id: str) -> _Call[JobDetail]:
    return _Call("GET", _path(job_id), lambda response: JobDetail.model_validate_json(response.content))


def _act(job_id: str, action: str) -> _Call[JobRecord]:
    return _Call("POST", f"{_path(job_id)}:{action}", _job)


def _scale(job_id: str, rollout_replicas: int) -> _Call[JobDetail]:
    headers = {"Content-Type": "application/json"}
    content = json.dumps({"rollout_replicas": rollout_replicas}).encode()
    return replace(_detail(job_id), method="POST", path=f"{_path(job_id)}:scale", headers=headers, content=content)


def _delete(job_id: str) -> _Call[None]:
    return _Call("DELETE", _path(job_id), lambda response: None)


def _metrics(job_id: str, names: Sequence[str], points: int) -> _Call[dict[str, Any]]:
    params = {"name": list(names), "points": points}
    return _Call("GET", f"{_path(job_id)}/metrics", lambda response: dict(response.json()["series"]), params)


def _get(job_id: str, what: str, **params: Any) -> _Call[dict[str, Any]]:
    return _Call("GET", f"{_path(job_id)}/{what}", _object, params)


def _path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


class _Settings:
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
        return ApiError(f"{self.url} does not answer ({error}). Is `jackpot serve` running there? Set JACKPOT_URL.")


def _raise_for(response: httpx.Response) -> None:
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


class _EventReader:
    """Lines of an event stream → events."""

    def __init__(self) -> None:
        self.last_id: str | None = None
        self._fields: dict[str, str] = {}

    def feed(self, line: str) -> Event | None:
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


class Client:
    """Talks to a control plane.

    Args:
        url: of the server; else JACKPOT_URL, else http://127.0.0.1:8700.
        token: of `jackpot token create`; else JACKPOT_TOKEN.
        ca: PEM file of the authority that signed the server's certificate, unless the system knows it.

    Every method raises :class:`~jackpot.errors.ApiError` with the server's own words if it refuses, or if nobody
    answers.
    """

    def __init__(self, url: str | None = None, token: str | None = None, ca: Path | None = None) -> None:
        self._settings = _Settings(url, token, ca)
        self._http = httpx.Client(**self._settings.arguments)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def submit(
        self,
        job: Mapping[str, Any],
        *,
        priority: int = 0,
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> JobRecord:
        """Submit a job file, as a mapping."""
        return self._do(_submit(job, priority, labels or {}, idempotency_key))

    def check(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Check a job file without starting anything: the job with every default, and notes."""
        return self._do(_check(job))

    def jobs(self, *, states: Sequence[str] = (), labels: Mapping[str, str] | None = None) -> Iterator[JobRecord]:
        """The jobs, newest first; pages are fetched as they are needed."""
        cursor = None
        while True:
            page = self._do(_page(states, labels or {}, 100, cursor))
            yield from page.jobs
            cursor = page.next_cursor
            if cursor is None:
                return

    def job(self, job_id: str) -> JobDetail:
        """A job."""
        return self._do(_detail(job_id))

    def cancel(self, job_id: str) -> JobRecord:
        """Stop a job."""
        return self._do(_act(job_id, "cancel"))

    def resume(self, job_id: str) -> JobRecord:
        """Let a failed or cancelled job go on."""
        return self._do(_act(job_id, "resume"))

    def scale(self, job_id: str, rollout_replicas: int) -> JobDetail:
        """Change how many rollout replicas a running job has."""
        return self._do(_scale(job_id, rollout_replicas))

    def delete(self, job_id: str) -> None:
        """Forget a finished job and its files."""
        self._do(_delete(job_id))

    def metrics(self, job_id: str, names: Sequence[str] = (), points: int = 300) -> dict[str, Any]:
        """The job's curves by name: ``{"x": […], "y": […]}``."""
        return self._do(_metrics(job_id, names, points))

    def ledger(self, job_id: str, entries: int = 0) -> dict[str, Any]:
        """How the job's groups ended."""
        return self._do(_get(job_id, "ledger", entries=entries))

    def checkpoints(self, job_id: str) -> list[dict[str, Any]]:
        """What can be pulled."""
        return list(self._do(_get(job_id, "checkpoints"))["checkpoints"])

    def samples(self, job_id: str, limit: int = 10) -> list[dict[str, Any]]:
        """Sample trajectories, newest first."""
        return list(self._do(_get(job_id, "samples", limit=limit))["samples"])

    def events(self, job_id: str, last_event_id: str | None = None) -> Iterator[Event]:
        """The job's events until it is over. A lost connection is taken up again where it was."""
        reader = _EventReader()
        reader.last_id = last_event_id
        failures = 0
        while True:
            headers = {"Last-Event-ID": reader.last_id} if reader.last_id else {}
            try:
                with self._http.stream("GET", f"{_path(job_id)}/events", headers=headers) as response:
                    if response.status_code >= 400:
                        response.read()
                        _raise_for(response)
                    for line in response.iter_lines():
                        event = reader.feed(line)
                        if event is not None:
                            failures = 0
                            yield event
                            if event.name == "end":
                                return
            except httpx.TransportError as error:
                failures += 1
                if failures >= ATTEMPTS * 4:
                    raise self._settings.unreachable(error) from error
            except ApiError as error:
                failures += 1
                if error.status != 503 or failures >= ATTEMPTS * 4:
                    raise
            time.sleep(RETRY_SECONDS)

    def wait(self, job_id: str) -> JobDetail:
        """Wait until the job is over."""
        for _ in self.events(job_id):
            pass
        return self.job(job_id)

    def logs(self, job_id: str, service: str | None = None, *, follow: bool = False, tail: int = 200) -> Iterator[str]:
        """Lines of the logs of one process, or of all."""
        params = {"follow": follow, "tail": tail} | ({"service": service} if service else {})
        timeout = httpx.Timeout(TIMEOUT_SECONDS, read=None if follow else TIMEOUT_SECONDS)
        try:
            with self._http.stream("GET", f"{_path(job_id)}/logs", params=params, timeout=timeout) as response:
                if response.status_code >= 400:
                    response.read()
                    _raise_for(response)
                yield from response.iter_lines()
        except httpx.TransportError as error:
            raise self._settings.unreachable(error) from error

    def pull(self, job_id: str, name: str, directory: Path, role: str = "policy") -> Path:
        """Download one model of a checkpoint into a new directory, in Hugging Face format."""
        if directory.exists():
            raise ApiError(f"{directory} exists already; name a directory that does not", 409)
        path = f"{_path(job_id)}/checkpoints/{name}"
        try:
            with self._http.stream("GET", path, params={"role": role}) as response:
                if response.status_code >= 400:
                    response.read()
                    _raise_for(response)
                return _unpack(response.iter_bytes(), directory)
        except httpx.TransportError as error:
            raise self._settings.unreachable(error) from error

    def _do(self, call: _Call[T]) -> T:
        for attempt in range(ATTEMPTS):
            try:
                response = self._http.request(
                    call.method, call.path, params=call.params, headers=call.headers, content=call.content
                )
            except httpx.TransportError as error:
                # The first attempt fails fast when nobody is there at all; a server that restarts drops connections.
                if isinstance(error, httpx.ConnectError) or attempt == ATTEMPTS - 1:
                    raise self._settings.unreachable(error) from error
            else:
                if response.status_code not in (429, 503) or attempt == ATTEMPTS - 1:
                    _raise_for(response)
                    return call.read(response)
            time.sleep(RETRY_SECONDS * 2**attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")


class AsyncClient:
    """:class:`Client` for asyncio: the same methods, awaited."""

    def __init__(self, url: str | None = None, token: str | None = None, ca: Path | None = None) -> None:
        self._settings = _Settings(url, token, ca)
        self._http = httpx.AsyncClient(**self._settings.arguments)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def submit(
        self,
        job: Mapping[str, Any],
        *,
        priority: int = 0,
        labels: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> JobRecord:
        """See :meth:`Client.submit`."""
        return await self._do(_submit(job, priority, labels or {}, idempotency_key))

    async def check(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Client.check`."""
        return await self._do(_check(job))

    async def jobs(
        self, *, states: Sequence[str] = (), labels: Mapping[str, str] | None = None
    ) -> AsyncIterator[JobRecord]:
        """See :meth:`Client.jobs`."""
        cursor = None
        while True:
            page = await self._do(_page(states, labels or {}, 100, cursor))
            for job in page.jobs:
                yield job
            cursor = page.next_cursor
            if cursor is None:
                return

    async def job(self, job_id: str) -> JobDetail:
        """See :meth:`Client.job`."""
        return await self._do(_detail(job_id))

    async def cancel(self, job_id: str) -> JobRecord:
        """See :meth:`Client.cancel`."""
        return await self._do(_act(job_id, "cancel"))

    async def resume(self, job_id: str) -> JobRecord:
        """See :meth:`Client.resume`."""
        return await self._do(_act(job_id, "resume"))

    async def scale(self, job_id: str, rollout_replicas: int) -> JobDetail:
        """See :meth:`Client.scale`."""
        return await self._do(_scale(job_id, rollout_replicas))

    async def delete(self, job_id: str) -> None:
        """See :meth:`Client.delete`."""
        await self._do(_delete(job_id))

    async def metrics(self, job_id: str, names: Sequence[str] = (), points: int = 300) -> dict[str, Any]:
        """See :meth:`Client.metrics`."""
        return await self._do(_metrics(job_id, names, points))

    async def ledger(self, job_id: str, entries: int = 0) -> dict[str, Any]:
        """See :meth:`Client.ledger`."""
        return await self._do(_get(job_id, "ledger", entries=entries))

    async def checkpoints(self, job_id: str) -> list[dict[str, Any]]:
        """See :meth:`Client.checkpoints`."""
        return list((await self._do(_get(job_id, "checkpoints")))["checkpoints"])

    async def samples(self, job_id: str, limit: int = 10) -> list[dict[str, Any]]:
        """See :meth:`Client.samples`."""
        return list((await self._do(_get(job_id, "samples", limit=limit)))["samples"])

    async def events(self, job_id: str, last_event_id: str | None = None) -> AsyncIterator[Event]:
        """See :meth:`Client.events`."""
        reader = _EventReader()
        reader.last_id = last_event_id
        failures = 0
        while True:
            headers = {"Last-Event-ID": reader.last_id} if reader.last_id else {}
            try:
                async with self._http.stream("GET", f"{_path(job_id)}/events", headers=headers) as response:
                    if response.status_code >= 400:
                        await response.aread()
                        _raise_for(response)
                    async for line in response.aiter_lines():
                        event = reader.feed(line)
                        if event is not None:
                            failures = 0
                            yield event
                            if event.name == "end":
                                return
            except httpx.TransportError as error:
                failures += 1
                if failures >= ATTEMPTS * 4:
                    raise self._settings.unreachable(error) from error
            except ApiError as error:
                failures += 1
                if error.status != 503 or failures >= ATTEMPTS * 4:
                    raise
            await asyncio.sleep(RETRY_SECONDS)

    async def wait(self, job_id: str) -> JobDetail:
        """See :meth:`Client.wait`."""
        async for _ in self.events(job_id):
            pass
        return await self.job(job_id)

    async def _do(self, call: _Call[T]) -> T:
        for attempt in range(ATTEMPTS):
            try:
                response = await self._http.request(
                    call.method, call.path, params=call.params, headers=call.headers, content=call.content
                )
            except httpx.TransportError as error:
                if isinstance(error, httpx.ConnectError) or attempt == ATTEMPTS - 1:
                    raise self._settings.unreachable(error) from error
            else:
                if response.status_code not in (429, 503) or attempt == ATTEMPTS - 1:
                    _raise_for(response)
                    return call.read(response)
            await asyncio.sleep(RETRY_SECONDS * 2**attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")


def _unpack(chunks: Iterator[bytes], directory: Path) -> Path:
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
