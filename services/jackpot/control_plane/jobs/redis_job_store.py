"""The job store on Redis or Valkey. Each change is one script, and so atomic."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import EqualJitterBackoff

from jackpot.control_plane.jobs.job_store import IdempotencyKey, JobPage
from jackpot.control_plane.jobs.records import JobRecord, Transition, now
from jackpot.control_plane.jobs.states import JobState, check_transition
from jackpot.errors import BusError, ConfigError, IdempotencyError, JobNotFoundError, JobStateError

LOG = logging.getLogger(__name__)

KEY_DAYS = 1.0  # how long an idempotency key is remembered; Stripe's is a day, too
RETRIES = 6
TIMEOUT_SECONDS = 10.0
SCAN_PAGES = 40  # how many pages of an index one filtered request may look through


class RedisJobStore:
    """Jobs in a Redis ≥ 7 or Valkey.

    Args:
        url: ``redis://``, ``rediss://`` or ``unix://``. The server should write every command through
            (``appendonly yes``, ``appendfsync always``); :meth:`check_server` says so if it does not.
        prefix: of all keys, with a hash tag, so that they share one node of a cluster.
    """

    def __init__(self, url: str, prefix: str = "jackpot:{control}:") -> None:
        parts = urlsplit(url)
        self._address = f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
        self._prefix = prefix
        self._redis: Any = Redis.from_url(  # its commands are typed as sync or async, both at once
            url,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
            retry=Retry(EqualJitterBackoff(cap=1.0, base=0.05), RETRIES),
        )
        self._create, self._transition, self._delete, self._page, self._lead = (
            self._redis.register_script(_source(name)) for name in ("create", "transition", "delete", "page", "lead")
        )

    async def check_server(self) -> None:
        """Check that the server answers and is durable; log a warning where it is not.

        Raises:
            BusError: it does not answer.
            ConfigError: it deletes keys when it is full.
        """
        async with self._translated():
            info = await self._redis.info()
            try:
                settings = await self._redis.config_get("append*")
            except exceptions.ResponseError:
                settings = {}  # managed servers refuse CONFIG; their operator decides on durability
        if str(info.get("maxmemory_policy", "noeviction")).startswith("allkeys-"):
            raise ConfigError("--store", self._address, "evicts keys when it is full", "Set noeviction.")
        if settings and (settings.get("appendonly"), settings.get("appendfsync")) != ("yes", "always"):
            LOG.warning(
                "the job store's server may lose what it has acknowledged: set appendonly yes and appendfsync always",
                extra={"server": self._address},
            )

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.aclose()

    async def create(
        self, record: JobRecord, spec: bytes, idempotency: IdempotencyKey | None = None
    ) -> tuple[JobRecord, bool]:
        """See :class:`JobStore`."""
        transition = Transition(time=record.created, before=None, state=record.state, reason=record.reason)
        keys = [
            *self._of_job(record.id),
            *(self._prefix + name for name in ("all", "sequence", "queue")),
            self._state(record.state),
            self._prefix + (f"idempotency:{idempotency.owner}:{idempotency.key}" if idempotency else "unused"),
            *(self._label(key, value) for key, value in record.labels.items()),
        ]
        fingerprint = idempotency.fingerprint if idempotency else ""
        args: list[str | bytes | int] = [
            record.id,
            record.model_dump_json(),
            spec,
            transition.model_dump_json(),
            record.priority,
            1 if idempotency else 0,
            fingerprint,
            int(KEY_DAYS * 86400),
        ]
        async with self._translated():
            made, known, is_new = await self._create(keys, args)
        if known.decode() != fingerprint:
            raise IdempotencyError("this Idempotency-Key was used for another request; choose a new key")
        if made.decode() == record.id:
            return record, bool(is_new)
        return await self.get(made.decode()), False

    async def get(self, job_id: str) -> JobRecord:
        """See :class:`JobStore`."""
        return JobRecord.model_validate_json(await self._raw(job_id))

    async def spec(self, job_id: str) -> bytes:
        """See :class:`JobStore`."""
        async with self._translated():
            data: bytes | None = await self._redis.get(self._of_job(job_id)[1])
        if data is None:
            raise JobNotFoundError(f"there is no job {job_id}")
        return data

    async def page(
        self, states: Collection[JobState], labels: Mapping[str, str], cursor: int | None, limit: int
    ) -> JobPage:
        """See :class:`JobStore`. A filtered page may hold fewer than ``limit`` although more follow."""
        index = self._index_for(states, labels)
        filtered = (len(states) > 1) or (len(labels) + len(states) > 1)
        records: dict[str, bytes] = {}
        for _ in range(SCAN_PAGES):
            entries, next_cursor = await self._slice(index, cursor, max(limit, 200) if filtered else limit)
            for number, job_id, data in entries:
                if filtered and not _matches(data, states, labels):
                    continue
                if len(records) == limit:
                    return JobPage(records, number)
                records[job_id] = data
            if next_cursor is None:
                return JobPage(records, None)
            cursor = next_cursor
            if not filtered or len(records) == limit:
                break
        return JobPage(records, cursor)

    async def in_states(self, *states: JobState) -> list[JobRecord]:
        """See :class:`JobStore`."""
        ids: list[tuple[int, str]] = []
        async with self._translated():
            for state in states:
                members = await self._redis.zrange(self._state(state), 0, -1, withscores=True)
                ids += [(int(number), job_id.decode()) for job_id, number in members]
        records = [JobRecord.model_validate_json(data) for _, _, data in await self._records(sorted(ids))]
        return [record for record in records if record.state in states]

    async def queue(self, count: int) -> list[JobRecord]:
        """See :class:`JobStore`."""
        async with self._translated():
            ids = await self._redis.zrange(self._prefix + "queue", 0, count - 1)
        records = await self._records([(0, job_id.decode()) for job_id in ids])
        return [JobRecord.model_validate_json(data) for _, _, data in records]

    async def transition(self, job_id: str, state: JobState, reason: str, **changes: Any) -> JobRecord:
        """See :class:`JobStore`."""
        while True:
            old = await self._raw(job_id)
            before = JobRecord.model_validate_json(old)
            check_transition(job_id, before.state, state)
            moment = now()
            after = JobRecord.model_validate(
                dict(before) | {"state": state, "reason": reason, "updated": moment, **changes}
            )
            step = Transition(time=moment, before=before.state, state=state, reason=reason)
            record, _, transitions = self._of_job(job_id)
            keys = [record, transitions, self._prefix + "all", self._prefix + "queue"]
            args: list[str | bytes | int] = [
                job_id,
                old,
                after.model_dump_json(),
                step.model_dump_json(),
                after.priority,
            ]
            args.append(1 if state is JobState.QUEUED else 0)
            async with self._translated():
                if await self._transition([*keys, self._state(before.state), self._state(state)], args):
                    return after

    async def transitions(self, job_id: str, start: int = 0) -> list[Transition]:
        """See :class:`JobStore`."""
        async with self._translated():
            lines = await self._redis.lrange(self._of_job(job_id)[2], start, -1)
        return [Transition.model_validate_json(line) for line in lines]

    async def delete(self, job_id: str) -> None:
        """See :class:`JobStore`."""
        while True:
            data = await self._raw(job_id)
            record = JobRecord.model_validate_json(data)
            if not record.state.finished:
                raise JobStateError(f"{job_id} is {record.state} and cannot be deleted; cancel it first")
            labels = [self._label(key, value) for key, value in record.labels.items()]
            indexes = [self._prefix + "all", self._prefix + "queue", self._state(record.state), *labels]
            async with self._translated():
                if await self._delete([*self._of_job(job_id), *indexes], [job_id, data]):
                    return

    async def counts(self) -> dict[JobState, int]:
        """See :class:`JobStore`."""
        async with self._translated():
            return {state: int(await self._redis.zcard(self._state(state))) for state in JobState}

    async def lead(self, server: str, seconds: float) -> bool:
        """See :class:`JobStore`."""
        async with self._translated():
            return bool(await self._lead([self._prefix + "leader"], [server, int(seconds * 1000)]))

    async def ping(self) -> None:
        """See :class:`JobStore`."""
        async with self._translated():
            await self._redis.ping()

    async def _raw(self, job_id: str) -> bytes:
        async with self._translated():
            data: bytes | None = await self._redis.get(self._of_job(job_id)[0])
        if data is None:
            raise JobNotFoundError(f"there is no job {job_id}")
        return data

    async def _slice(
        self, index: str, cursor: int | None, limit: int
    ) -> tuple[list[tuple[int, str, bytes]], int | None]:
        """Records with their numbers and ids, newest first, and the number that follows."""
        newest = "+inf" if cursor is None else cursor
        async with self._translated():
            members, records = await self._page([index], [newest, limit, self._of_job("")[0]])
        ids = [
            (int(float(number)), job_id.decode()) for job_id, number in zip(members[::2], members[1::2], strict=True)
        ]
        following = ids[limit][0] if len(ids) > limit else None
        # A job that was deleted a moment ago is missing.
        whole = zip(ids[:limit], records, strict=True)
        return [(number, job_id, data) for (number, job_id), data in whole if data is not None], following

    async def _records(self, ids: list[tuple[int, str]]) -> list[tuple[int, str, bytes]]:
        if not ids:
            return []
        async with self._translated():
            contents = await self._redis.mget([self._of_job(job_id)[0] for _, job_id in ids])
        # A job that was deleted a moment ago is missing.
        return [
            (number, job_id, data) for (number, job_id), data in zip(ids, contents, strict=True) if data is not None
        ]

    def _index_for(self, states: Collection[JobState], labels: Mapping[str, str]) -> str:
        if labels:
            return self._label(*next(iter(labels.items())))
        return self._state(next(iter(states))) if len(states) == 1 else self._prefix + "all"

    def _of_job(self, job_id: str) -> tuple[str, str, str]:
        return tuple(f"{self._prefix}{kind}:{job_id}" for kind in ("record", "spec", "transitions"))  # type: ignore[return-value]

    def _state(self, state: JobState) -> str:
        return f"{self._prefix}state:{state}"

    def _label(self, key: str, value: str) -> str:
        return f"{self._prefix}label:{key}={value}"

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        try:
            yield
        except exceptions.RedisError as error:
            raise BusError(f"the job store at {self._address} does not do as asked ({error})") from error


def _matches(data: bytes, states: Collection[JobState], labels: Mapping[str, str]) -> bool:
    record = JobRecord.model_validate_json(data)
    return (not states or record.state in states) and labels.items() <= record.labels.items()


def _source(name: str) -> str:
    return resources.files("jackpot.control_plane.jobs").joinpath("store_scripts", f"{name}.lua").read_text("utf-8")
