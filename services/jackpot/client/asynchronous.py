"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx

from jackpot.client import calls
from jackpot.client.calls import Event
from jackpot.control_plane.jobs.records import JobDetail, JobRecord
from jackpot.errors import ApiError

T = TypeVar("T")


class AsyncClient:
    """:class:`Client` for asyncio: the same methods, awaited."""

    def __init__(self, url: str | None = None, token: str | None = None, ca: Path | None = None) -> None:
        self._settings = calls.Settings(url, token, ca)
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
        cursor = None
        while True:
            page = await self._do(calls.page(states, labels or {}, 100, cursor))
            for job in page.jobs:
                yield job
            cursor = page.next_cursor
            if cursor is None:
                return

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
        return await self._do(calls.get(job_id, "ledger", entries=entries))

    async def checkpoints(self, job_id: str) -> list[dict[str, Any]]:
        """See :meth:`Client.checkpoints`."""
        return list((await self._do(calls.get(job_id, "checkpoints")))["checkpoints"])

    async def samples(self, job_id: str, limit: int = 10) -> list[dict[str, Any]]:
        """See :meth:`Client.samples`."""
        return list((await self._do(calls.get(job_id, "samples", limit=limit)))["samples"])

    async def events(self, job_id: str, last_event_id: str | None = None) -> AsyncIterator[Event]:
        """See :meth:`Client.events`."""
        reader = calls.EventReader()
        reader.last_id = last_event_id
        failures = 0
        while True:
            headers = {"Last-Event-ID": reader.last_id} if reader.last_id else {}
            try:
                async with self._http.stream("GET", f"{calls.path_of(job_id)}/events", headers=headers) as response:
                    if response.status_code >= 400:
                        await response.aread()
                        calls.raise_for(response)
                    async for line in response.aiter_lines():
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
            await asyncio.sleep(calls.RETRY_SECONDS)

    async def wait(self, job_id: str) -> JobDetail:
        """See :meth:`Client.wait`."""
        async for _ in self.events(job_id):
            pass
        return await self.job(job_id)

    async def _do(self, call: calls.Call[T]) -> T:
        for attempt in range(calls.ATTEMPTS):
            try:
                response = await self._http.request(
                    call.method, call.path, params=call.params, headers=call.headers, content=call.content
                )
            except httpx.TransportError as error:
                if isinstance(error, httpx.ConnectError) or attempt == calls.ATTEMPTS - 1:
                    raise self._settings.unreachable(error) from error
            else:
                if response.status_code not in (429, 503) or attempt == calls.ATTEMPTS - 1:
                    calls.raise_for(response)
                    return call.read(response)
            await asyncio.sleep(calls.RETRY_SECONDS * 2**attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")
