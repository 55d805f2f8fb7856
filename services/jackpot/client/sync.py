"""The client that blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx

from jackpot.client import calls
from jackpot.client.calls import Event
from jackpot.control_plane.jobs.records import JobDetail, JobRecord
from jackpot.errors import ApiError

T = TypeVar("T")


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
        self._settings = calls.Settings(url, token, ca)
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
        return self._do(calls.submit(job, priority, labels or {}, idempotency_key))

    def check(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Check a job file without starting anything: the job with every default, and notes."""
        return self._do(calls.check(job))

    def jobs(self, *, states: Sequence[str] = (), labels: Mapping[str, str] | None = None) -> Iterator[JobRecord]:
        """The jobs, newest first; pages are fetched as they are needed."""
        cursor = None
        while True:
            page = self._do(calls.page(states, labels or {}, 100, cursor))
            yield from page.jobs
            cursor = page.next_cursor
            if cursor is None:
                return

    def job(self, job_id: str) -> JobDetail:
        """A job."""
        return self._do(calls.detail(job_id))

    def cancel(self, job_id: str) -> JobRecord:
        """Stop a job."""
        return self._do(calls.act(job_id, "cancel"))

    def resume(self, job_id: str) -> JobRecord:
        """Let a failed or cancelled job go on."""
        return self._do(calls.act(job_id, "resume"))

    def scale(self, job_id: str, rollout_replicas: int) -> JobDetail:
        """Change how many rollout replicas a running job has."""
        return self._do(calls.scale(job_id, rollout_replicas))

    def delete(self, job_id: str) -> None:
        """Forget a finished job and its files."""
        self._do(calls.delete(job_id))

    def metrics(self, job_id: str, names: Sequence[str] = (), points: int = 300) -> dict[str, Any]:
        """The job's curves by name: ``{"x": […], "y": […]}``."""
        return self._do(calls.metrics(job_id, names, points))

    def ledger(self, job_id: str, entries: int = 0) -> dict[str, Any]:
        """How the job's groups ended."""
        return self._do(calls.get(job_id, "ledger", entries=entries))

    def checkpoints(self, job_id: str) -> list[dict[str, Any]]:
        """What can be pulled."""
        return list(self._do(calls.get(job_id, "checkpoints"))["checkpoints"])

    def samples(self, job_id: str, limit: int = 10) -> list[dict[str, Any]]:
        """Sample trajectories, newest first."""
        return list(self._do(calls.get(job_id, "samples", limit=limit))["samples"])

    def events(self, job_id: str, last_event_id: str | None = None) -> Iterator[Event]:
        """The job's events until it is over. A lost connection is taken up again where it was."""
        reader = calls.EventReader()
        reader.last_id = last_event_id
        failures = 0
        while True:
            headers = {"Last-Event-ID": reader.last_id} if reader.last_id else {}
            try:
                with self._http.stream("GET", f"{calls.path_of(job_id)}/events", headers=headers) as response:
                    if response.status_code >= 400:
                        response.read()
                        calls.raise_for(response)
                    for line in response.iter_lines():
                        event = reader.feed(line)
                        if event is not None:
                            failures = 0
                            yield event
                            if event.name == "end":
                                return
            except httpx.TransportError as error:
                failures += 1
                if failures >= calls.ATTEMPTS * 4:
                    raise self._settings.unreachable(error) from error
            except ApiError as error:
                failures += 1
                if error.status != 503 or failures >= calls.ATTEMPTS * 4:
                    raise
            time.sleep(calls.RETRY_SECONDS)

    def wait(self, job_id: str) -> JobDetail:
        """Wait until the job is over."""
        for _ in self.events(job_id):
            pass
        return self.job(job_id)

    def logs(self, job_id: str, service: str | None = None, *, follow: bool = False, tail: int = 200) -> Iterator[str]:
        """Lines of the logs of one process, or of all."""
        params = {"follow": follow, "tail": tail} | ({"service": service} if service else {})
        timeout = httpx.Timeout(calls.TIMEOUT_SECONDS, read=None if follow else calls.TIMEOUT_SECONDS)
        try:
            with self._http.stream("GET", f"{calls.path_of(job_id)}/logs", params=params, timeout=timeout) as response:
                if response.status_code >= 400:
                    response.read()
                    calls.raise_for(response)
                yield from response.iter_lines()
        except httpx.TransportError as error:
            raise self._settings.unreachable(error) from error

    def pull(self, job_id: str, name: str, directory: Path, role: str = "policy") -> Path:
        """Download one model of a checkpoint into a new directory, in Hugging Face format."""
        if directory.exists():
            raise ApiError(f"{directory} exists already; name a directory that does not", 409)
        path = f"{calls.path_of(job_id)}/checkpoints/{name}"
        try:
            with self._http.stream("GET", path, params={"role": role}) as response:
                if response.status_code >= 400:
                    response.read()
                    calls.raise_for(response)
                return calls.unpack(response.iter_bytes(), directory)
        except httpx.TransportError as error:
            raise self._settings.unreachable(error) from error

    def _do(self, call: calls.Call[T]) -> T:
        for attempt in range(calls.ATTEMPTS):
            try:
                response = self._http.request(
                    call.method, call.path, params=call.params, headers=call.headers, content=call.content
                )
            except httpx.TransportError as error:
                # The first attempt fails fast when nobody is there at all; a server that restarts drops connections.
                if isinstance(error, httpx.ConnectError) or attempt == calls.ATTEMPTS - 1:
                    raise self._settings.unreachable(error) from error
            else:
                if response.status_code not in (429, 503) or attempt == calls.ATTEMPTS - 1:
                    calls.raise_for(response)
                    return call.read(response)
            time.sleep(calls.RETRY_SECONDS * 2**attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")
