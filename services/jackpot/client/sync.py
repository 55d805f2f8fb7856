"""The blocking client: only the transport of calls."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx

from jackpot.client import calls
from jackpot.client.conversation import RETRY_SECONDS, Event, EventFollower, Settings, attempts, raise_for, timeout_of
from jackpot.client.unpacking import unpack
from jackpot.control_plane.jobs.records import JobDetail, JobList, JobRecord
from jackpot.errors import ApiError

T = TypeVar("T")


class Client:
    """Talks to a control plane.

    Args:
        url: of the server; else JACKPOT_URL, else http://127.0.0.1:8700.
        token: of `jackpot token create`; else JACKPOT_TOKEN.
        ca: PEM file of the authority that signed the server's certificate, unless the system trusts it.

    Every method raises :class:`~jackpot.errors.ApiError` with the server's message if it refuses, or if it does
    not answer.
    """

    def __init__(self, url: str | None = None, token: str | None = None, ca: Path | None = None) -> None:
        self._settings = Settings(url, token, ca)
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
        call: calls.Call[JobList] | None = calls.page(states, labels or {})
        while call is not None:
            page = self._do(call)
            yield from page.jobs
            call = calls.page_after(call, page)

    def job(self, job_id: str) -> JobDetail:
        """A job."""
        return self._do(calls.detail(job_id))

    def cancel(self, job_id: str) -> JobRecord:
        """Stop a job."""
        return self._do(calls.act(job_id, "cancel"))

    def resume(self, job_id: str) -> JobRecord:
        """Resume a failed or cancelled job."""
        return self._do(calls.act(job_id, "resume"))

    def scale(self, job_id: str, rollout_replicas: int) -> JobDetail:
        """Change how many rollout replicas a running job has."""
        return self._do(calls.scale(job_id, rollout_replicas))

    def delete(self, job_id: str) -> None:
        """Delete a finished job and its files."""
        self._do(calls.delete(job_id))

    def metrics(self, job_id: str, names: Sequence[str] = (), points: int = 300) -> dict[str, Any]:
        """The job's curves by name: ``{"x": […], "y": […]}``."""
        return self._do(calls.metrics(job_id, names, points))

    def ledger(self, job_id: str, entries: int = 0) -> dict[str, Any]:
        """How the job's groups ended."""
        return self._do(calls.ledger(job_id, entries))

    def checkpoints(self, job_id: str) -> list[dict[str, Any]]:
        """The checkpoints that can be pulled."""
        return self._do(calls.checkpoints(job_id))

    def samples(self, job_id: str, limit: int = 10) -> list[dict[str, Any]]:
        """Sample trajectories, newest first."""
        return self._do(calls.samples(job_id, limit))

    def events(self, job_id: str, last_event_id: str | None = None) -> Iterator[Event]:
        """The job's events until it is over. A lost connection resumes where it stopped."""
        follower = EventFollower(job_id, last_event_id, self._settings)
        while True:
            with follower.connection(), self._streamed(follower.stream) as response:
                for line in response.iter_lines():
                    event = follower.feed(line)
                    if event is not None:
                        yield event
                    if follower.over:
                        return
            time.sleep(RETRY_SECONDS)

    def wait(self, job_id: str) -> JobDetail:
        """Wait until the job is over."""
        for _ in self.events(job_id):
            pass
        return self.job(job_id)

    def logs(self, job_id: str, service: str | None = None, *, follow: bool = False, tail: int = 200) -> Iterator[str]:
        """Lines of the logs of one process, or of all."""
        with self._settings.reaching(), self._streamed(calls.logs(job_id, service, follow, tail)) as response:
            yield from response.iter_lines()

    def pull(self, job_id: str, name: str, directory: Path, role: str = "policy") -> Path:
        """Download one model of a checkpoint into a new directory, in Hugging Face format."""
        if directory.exists():
            raise ApiError(f"{directory} exists already; name a directory that does not", 409)
        with self._settings.reaching(), self._streamed(calls.archive(job_id, name, role)) as response:
            return unpack(response.iter_bytes(), directory)

    @contextmanager
    def _streamed(self, stream: calls.Stream) -> Iterator[httpx.Response]:
        with self._http.stream(
            "GET", stream.path, params=stream.params, headers=stream.headers, timeout=timeout_of(stream)
        ) as response:
            if response.status_code >= 400:
                response.read()
                raise_for(response)
            yield response

    def _do(self, call: calls.Call[T]) -> T:
        exchange = attempts(call, self._settings)
        try:
            pause_seconds = next(exchange)
            while True:
                time.sleep(pause_seconds)
                pause_seconds = exchange.send(self._outcome(call))
        except StopIteration as done:
            answer: T = done.value
            return answer

    def _outcome(self, call: calls.Call[T]) -> httpx.Response | httpx.TransportError:
        try:
            return self._http.request(
                call.method, call.path, params=call.params, headers=call.headers, content=call.content
            )
        except httpx.TransportError as error:
            return error
