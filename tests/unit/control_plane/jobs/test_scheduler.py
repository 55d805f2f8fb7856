"""The scheduler on a real store: what counts as a loss, and how many jobs hold processes."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from jackpot.config import parse_job
from jackpot.control_plane.jobs.records import JobRecord, new_job_id, now
from jackpot.control_plane.jobs.redis_job_store import RedisJobStore
from jackpot.control_plane.jobs.scheduler import Scheduler, SchedulingPolicy
from jackpot.control_plane.launch.launcher_choice import LauncherChoice
from jackpot.storage.run_directory import RunDirectory

# Sessions outlive the scheduler that started them, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")

JOB = parse_job({"policy": {"model": "/models/none"}, "actor": "policy", "task": {"name": "complement"}})


@pytest.fixture
async def store(valkey_url: str) -> AsyncIterator[RedisJobStore]:
    one = RedisJobStore(valkey_url, prefix=f"test:{{{secrets.token_hex(4)}}}:")
    yield one
    await one.close()


@pytest.fixture(autouse=True)
def sessions_end(tmp_path: Path) -> Iterator[None]:
    yield
    kill_sessions(tmp_path)


def kill_sessions(runs: Path) -> int:
    """How many sessions of these runs this process had started."""
    ours = [child for child in psutil.Process().children() if any(str(runs) in word for word in child.cmdline())]
    for child in ours:
        child.kill()
        child.wait()
    return len(ours)


async def submit(store: RedisJobStore, **fields: object) -> JobRecord:
    moment = now()
    values = {"id": new_job_id("job"), "name": "job", "state": "queued", "reason": "submitted", "steps": 5}
    job = JobRecord.model_validate(values | {"created": moment, "updated": moment} | fields)
    await store.create(job, JOB.model_dump_json().encode())
    return job


def scheduler_on(store: RedisJobStore, runs: Path, *, cluster: bool = False, slots: int = 1) -> Scheduler:
    choice = LauncherChoice(cluster=runs / "cluster.yaml" if cluster else None)
    return Scheduler(store, runs, SchedulingPolicy(slots=slots), choice)


@pytest.mark.parametrize(("cluster", "losses"), [(True, 1), (False, 1)])
async def test_a_session_of_this_server_that_vanishes_is_a_loss(
    store: RedisJobStore, tmp_path: Path, cluster: bool, losses: int
) -> None:
    job, scheduler = await submit(store), scheduler_on(store, tmp_path, cluster=cluster)
    await scheduler.look()
    assert kill_sessions(tmp_path) == 1
    await scheduler.look()
    assert (await store.get(job.id)).losses == losses


@pytest.mark.parametrize(("cluster", "losses"), [(True, 0), (False, 1)])
async def test_on_a_cluster_a_session_that_ended_with_another_server_is_none(
    store: RedisJobStore, tmp_path: Path, cluster: bool, losses: int
) -> None:
    """The processes that it followed run on there."""
    job = await submit(store, state="starting", session=1)
    RunDirectory.create(tmp_path / job.id, job.id, JOB)
    await scheduler_on(store, tmp_path, cluster=cluster).look()
    assert (await store.get(job.id)).losses == losses


async def test_no_more_jobs_hold_processes_than_there_are_slots(store: RedisJobStore, tmp_path: Path) -> None:
    scheduler = scheduler_on(store, tmp_path, slots=2)
    jobs = [await submit(store) for _ in range(4)]
    for _ in range(3):
        await scheduler.look()
    states = [(await store.get(job.id)).state for job in jobs]
    assert [str(state) for state in states] == ["starting", "starting", "queued", "queued"]
    assert kill_sessions(tmp_path) == 2
