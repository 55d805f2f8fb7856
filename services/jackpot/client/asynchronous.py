"""The client for asyncio: only the transport of calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx

from jackpot.client import calls
from jackpot.client.conversation import RETRY_SECONDS, Event, EventFollower, Settings, attempts, raise_for, timeout_of
from jackpot.control_plane.jobs.records import JobDetail, JobList, JobRecord

T = TypeVar("T")


class AsyncClient:
    """:class:`Client` for asyncio: the same methods, awaited, except ``logs`` and ``pull``."""

    def __init__(self, url: str | None = None, token: str | None = None, ca: Path | None = None) -> None:
        self._settings = Settings(url, token, ca)
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
        return await self._do(calls.submit(job, priority, labels or {}, idempotency_key))

    async def check(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`Client.check`."""
        return await self._do(calls.check(job))

    async def jobs(
        self, *, states: Sequence[str] = (), labels: Mapping[str, str] | None = None
    ) -> AsyncIterator[JobRecord]:
        """See :meth:`Client.jobs`."""
        call: calls.Call[JobList] | None = calls.page(states, labels or {})
        while call is not None:
            page = await self._do(call)
            for job in page.jobs:
                yield job
            call = calls.page_after(call, page)

    async def job(self, job_id: str) -> JobDetail:
        """See :meth:`Client.job`."""
        return await self._do(calls.detail(job_id))

    async def cancel(self, job_id: str) -> JobRecord:
        """See :meth:`Client.cancel`."""
        return await self._do(calls.act(job_id, "cancel"))

    async def resume(self, job_id: str) -> JobRecord:
        """See :meth:`Client.resume`."""
        return await self._do(calls.act(job_id, "resume"))

    async def scale(self, job_id: str, rollout_replicas: int) -> JobDetail:
        """See :meth:`Client.scale`."""
        return await self._do(calls.scale(job_id, rollout_replicas))

    async def delete(self, job_id: str) -> None:
        """See :meth:`Client.delete`."""
        await self._do(calls.delete(job_id))

    async def metrics(self, job_id: str, names: Sequence[str] = (), points: int = 300) -> dict[str, Any]:
        """See :meth:`Client.metrics`."""
        return await self._do(calls.metrics(job_id, names, points))

    async def ledger(self, job_id: str, entries: int = 0) -> dict[str, Any]:
        """See :meth:`Client.ledger`."""
        return await self._do(calls.ledger(job_id, entries))

    async def checkpoints(self, job_id: str) -> list[dict[str, Any]]:
        """See :meth:`Client.checkpoints`."""
        return await self._do(calls.checkpoints(job_id))

    async def samples(self, job_id: str, limit: int = 10) -> list[dict[str, Any]]:
        """See :meth:`Client.samples`."""
        return await self._do(calls.samples(job_id, limit))

    async def events(self, job_id: str, last_event_id: str | None = None) -> AsyncIterator[Event]:
        """See :meth:`Client.events`."""
        follower = EventFollower(job_id, last_event_id, self._settings)
        while True:
            with follower.connection():
                async with self._streamed(follower.stream) as response:
                    async for line in response.aiter_lines():
                        event = follower.feed(line)
                        if event is not None:
                            yield event
                        if follower.over:
                            return
            await asyncio.sleep(RETRY_SECONDS)

    async def wait(self, job_id: str) -> JobDetail:
        """See :meth:`Client.wait`."""
        async for _ in self.events(job_id):
            pass
        return await self.job(job_id)

    @asynccontextmanager
    async def _streamed(self, stream: calls.Stream) -> AsyncIterator[httpx.Response]:
        async with self._http.stream(
            "GET", stream.path, params=stream.params, headers=stream.headers, timeout=timeout_of(stream)
        ) as response:
            if response.status_code >= 400:
                await response.aread()
                raise_for(response)
            yield response

    async def _do(self, call: calls.Call[T]) -> T:
        exchange = attempts(call, self._settings)
        try:
            pause_seconds = next(exchange)
            while True:
                await asyncio.sleep(pause_seconds)
                pause_seconds = exchange.send(await self._outcome(call))
        except StopIteration as done:
            answer: T = done.value
            return answer

    async def _outcome(self, call: calls.Call[T]) -> httpx.Response | httpx.TransportError:
        try:
            return await self._http.request(
                call.method, call.path, params=call.params, headers=call.headers, content=call.content
            )
        except httpx.TransportError as error:
            return error
