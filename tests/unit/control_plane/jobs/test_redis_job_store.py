"""The job store, on a real server."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from jackpot.bus.server import EmbeddedServer
from jackpot.control_plane.jobs.job_store import IdempotencyKey
from jackpot.control_plane.jobs.records import JobRecord, Progress, new_job_id, now
from jackpot.control_plane.jobs.redis_job_store import RedisJobStore
from jackpot.control_plane.jobs.states import JobState
from jackpot.errors import BusError, IdempotencyError, JobNotFoundError, JobStateError

SPEC = b'{"name": "job"}'


def record(**fields: object) -> JobRecord:
    moment = now()
    values = {"id": new_job_id("job"), "name": "job", "state": "queued", "reason": "submitted", "steps": 5}
    return JobRecord.model_validate(values | {"created": moment, "updated": moment} | fields)


@pytest.fixture
async def store(valkey_url: str) -> AsyncIterator[RedisJobStore]:
    one = RedisJobStore(valkey_url, prefix=f"test:{{{secrets.token_hex(4)}}}:")
    yield one
    await one.close()


async def ids_of(store: RedisJobStore, *, limit: int = 50, states: tuple[str, ...] = (), **labels: str) -> list[str]:
    found: list[str] = []
    cursor = None
    while True:
        page = await store.page([JobState(state) for state in states], labels, cursor, limit)
        found += page.records
        assert len(page.records) <= limit
        cursor = page.next_cursor
        if cursor is None:
            return found


async def test_a_job_comes_back_as_it_was_stored(store: RedisJobStore) -> None:
    job = record(labels={"team": "a"}, priority=3)
    assert await store.create(job, SPEC) == (job, True)
    assert await store.get(job.id) == job
    assert await store.spec(job.id) == SPEC
    assert [step.state for step in await store.transitions(job.id)] == [JobState.QUEUED]
    with pytest.raises(JobNotFoundError):
        await store.get("job-0")


async def test_transitions_keep_reason_and_time_and_refuse_what_the_table_lacks(store: RedisJobStore) -> None:
    job, _ = await store.create(record(), SPEC)
    started = await store.transition(job.id, JobState.STARTING, "a slot is free", session=1, started=now())
    assert started.session == 1 and started.state is JobState.STARTING
    await store.transition(job.id, JobState.RUNNING, "up", progress=Progress(step=2))
    with pytest.raises(JobStateError):
        await store.transition(job.id, JobState.CANCELLED, "no")
    steps = await store.transitions(job.id)
    assert [(s.before, s.state, s.reason) for s in steps[1:]] == [
        ("queued", "starting", "a slot is free"),
        ("starting", "running", "up"),
    ]
    assert steps[2].time >= steps[1].time
    assert await store.transitions(job.id, start=2) == steps[2:]
    assert (await store.get(job.id)).progress.step == 2
    assert await store.counts() == {state: int(state is JobState.RUNNING) for state in JobState}


async def test_of_two_concurrent_changes_each_sees_the_other(store: RedisJobStore) -> None:
    job, _ = await store.create(record(), SPEC)
    results = await asyncio.gather(
        *(store.transition(job.id, JobState.STARTING, f"{index}") for index in range(5)), return_exceptions=True
    )
    assert sum(isinstance(result, JobRecord) for result in results) == 1
    assert sum(isinstance(result, JobStateError) for result in results) == 4


async def test_one_idempotency_key_makes_one_job(store: RedisJobStore) -> None:
    key = IdempotencyKey("me", "k1", "f1")
    results = await asyncio.gather(*(store.create(record(), SPEC, key) for _ in range(20)))
    assert len({job.id for job, _ in results}) == 1
    assert sum(is_new for _, is_new in results) == 1
    assert len(await ids_of(store)) == 1
    with pytest.raises(IdempotencyError):
        await store.create(record(), SPEC, IdempotencyKey("me", "k1", "f2"))
    other, is_new = await store.create(record(), SPEC, IdempotencyKey("you", "k1", "f2"))
    assert is_new and other.id != results[0][0].id


async def test_the_queue_goes_by_priority_then_age_and_a_resumed_job_gets_its_place_back(store: RedisJobStore) -> None:
    jobs = [(await store.create(record(priority=priority), SPEC))[0] for priority in (0, 5, 0, -2)]
    order = [jobs[1], jobs[0], jobs[2], jobs[3]]
    assert await store.queue(10) == order
    await store.transition(jobs[0].id, JobState.CANCELLED, "on request")
    assert [job.id for job in await store.queue(2)] == [jobs[1].id, jobs[2].id]
    await store.transition(jobs[0].id, JobState.QUEUED, "resumed")
    assert [job.id for job in await store.queue(10)] == [job.id for job in order]


async def test_pages_are_newest_first_and_complete_under_every_filter(store: RedisJobStore) -> None:
    jobs = [
        (await store.create(record(labels={"team": "ab"[index % 2], "n": str(index % 3)}), SPEC))[0].id
        for index in range(11)
    ]
    for job_id in jobs[:4]:
        await store.transition(job_id, JobState.CANCELLED, "on request")
    newest = jobs[::-1]
    assert await ids_of(store, limit=3) == newest
    assert await ids_of(store, limit=2, states=("cancelled",)) == newest[7:]
    assert await ids_of(store, limit=2, team="a") == newest[::2]
    assert await ids_of(store, limit=1, team="a", n="0") == [jobs[6], jobs[0]]
    assert await ids_of(store, limit=1, states=("cancelled",), team="a") == [jobs[2], jobs[0]]
    assert await ids_of(store, limit=2, states=("queued", "cancelled")) == newest
    assert await ids_of(store, team="c") == []


async def test_a_new_job_does_not_shift_the_pages_behind_a_cursor(store: RedisJobStore) -> None:
    jobs = [(await store.create(record(), SPEC))[0].id for _ in range(4)]
    first = await store.page([], {}, None, 2)
    await store.create(record(), SPEC)
    second = await store.page([], {}, first.next_cursor, 2)
    assert [*first.records, *second.records] == jobs[::-1]


async def test_only_finished_jobs_can_be_deleted_and_nothing_of_them_stays(store: RedisJobStore) -> None:
    job, _ = await store.create(record(labels={"team": "a"}), SPEC)
    with pytest.raises(JobStateError, match="cancel it first"):
        await store.delete(job.id)
    await store.transition(job.id, JobState.CANCELLED, "on request")
    await store.delete(job.id)
    assert await ids_of(store) == await ids_of(store, team="a") == []
    with pytest.raises(JobNotFoundError):
        await store.delete(job.id)
    with pytest.raises(JobNotFoundError):
        await store.spec(job.id)


async def test_what_was_acknowledged_survives_a_kill_of_the_server(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "store", appendfsync="always")
    await server.start()
    store = RedisJobStore(server.url)
    try:
        await store.check_server()
        jobs = [(await store.create(record(), SPEC))[0].id for _ in range(20)]
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        while server.poll() is None:
            await asyncio.sleep(0.01)
        await server.start()
        assert await ids_of(store) == jobs[::-1]
    finally:
        await store.close()
        await server.stop()


async def test_a_store_that_is_gone_is_an_error_of_ours(tmp_path: Path) -> None:
    store = RedisJobStore(f"unix://{tmp_path}/nobody.sock")
    with pytest.raises(BusError, match="job store"):
        await store.ping()
    await store.close()
