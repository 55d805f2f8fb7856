"""Rollout replicas that join a running job, and those that leave it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from patience import PATIENCE_SECONDS, TEST_SECONDS
from scripted_rollout import ScriptedRollout, start_scripted

from jackpot.orchestrator.membership import RolloutMembership
from jackpot.orchestrator.replicas import ReplicaPool
from jackpot.process.scaling import announce_rollout, set_wanted_replicas, withdraw_rollout
from jackpot.rpc.channel import open_channel
from jackpot.rpc.proto import ids_to_bytes
from jackpot.v1 import rollout_pb2

pytestmark = pytest.mark.timeout(TEST_SECONDS)


def request(name: str) -> rollout_pb2.GenerateRequest:
    sampling = rollout_pb2.SamplingParams(temperature=1.0, max_tokens=16, top_logprobs=2, seed=5)
    return rollout_pb2.GenerateRequest(
        group_id=name, prompt_token_ids=ids_to_bytes([3, 4]), num_trajectories=2, sampling=sampling
    )


class Job:
    """Three servers of which the pool at first knows only number 0."""

    def __init__(self, run_dir: Path, sockets: Path) -> None:
        self.run_dir = run_dir
        self.addresses = [f"unix:{sockets}/{index}" for index in range(3)]
        self.servers = [ScriptedRollout() for _ in range(3)]
        self.pool = ReplicaPool(open_channel, self.addresses[:1], 1, PATIENCE_SECONDS)
        self.membership = RolloutMembership(self.pool, run_dir, self.addresses[:1])

    async def wait_ready(self, replicas: int) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self.pool.num_ready != replicas:
                await asyncio.sleep(0.01)

    def answered(self) -> list[int]:
        return [len(server.requests) for server in self.servers]


@pytest.fixture
async def job(tmp_path: Path) -> AsyncIterator[Job]:
    with tempfile.TemporaryDirectory() as directory:  # short paths: a unix socket's has at most 107 bytes
        async with running(Job(tmp_path, Path(directory))) as job:
            yield job


@asynccontextmanager
async def running(job: Job) -> AsyncIterator[Job]:
    servers = [await start_scripted(*pair) for pair in zip(job.addresses, job.servers, strict=True)]
    watching = asyncio.create_task(job.pool.watch())
    try:
        yield job
    finally:
        watching.cancel()
        await asyncio.wait([watching])
        await job.pool.close()
        for server in servers:
            await server.stop(0)


async def test_replicas_join_as_they_announce_themselves_and_only_as_many_as_are_wanted(job: Job) -> None:
    for index in (1, 2):
        announce_rollout(job.run_dir, str(index), job.addresses[index])
    await job.membership.look()
    await job.wait_ready(1)  # announced, but nobody has asked for them
    assert job.pool.num_wanted == 1

    set_wanted_replicas(job.run_dir, 2)
    await job.membership.look()
    await job.wait_ready(2)
    await asyncio.gather(*(job.pool.generate(request(str(index))) for index in range(6)))
    assert job.answered() == [3, 3, 0]

    set_wanted_replicas(job.run_dir, 5)  # two of which are not there yet
    await job.membership.look()
    await job.wait_ready(3)
    assert job.pool.num_wanted == 5


async def test_one_that_leaves_finishes_what_it_has_and_is_asked_for_nothing_more(job: Job) -> None:
    announce_rollout(job.run_dir, "1", job.addresses[1])
    set_wanted_replicas(job.run_dir, 2)
    await job.membership.look()
    await job.wait_ready(2)
    release = asyncio.Event()

    async def wait(_: rollout_pb2.GenerateRequest) -> None:
        await release.wait()

    job.servers[0].before = job.servers[1].before = wait
    before = [asyncio.create_task(job.pool.generate(request(f"before-{index}"))) for index in range(2)]
    async with asyncio.timeout(PATIENCE_SECONDS):
        while job.answered() != [1, 1, 0]:
            await asyncio.sleep(0.01)
    set_wanted_replicas(job.run_dir, 1)
    await job.membership.look()
    after = [asyncio.create_task(job.pool.generate(request(f"after-{index}"))) for index in range(4)]
    async with asyncio.timeout(PATIENCE_SECONDS):
        while job.answered() != [5, 1, 0]:
            await asyncio.sleep(0.01)
    release.set()
    done = await asyncio.gather(*before, *after)
    assert [len(group) for group in done] == [2] * 6
    assert job.answered()[1] == 1


async def test_a_group_that_a_leaving_replica_drops_costs_no_attempt(job: Job) -> None:
    """The pool's only attempt is for failures, and a replica that was told to end has not failed."""
    announce_rollout(job.run_dir, "1", job.addresses[1])
    set_wanted_replicas(job.run_dir, 2)
    await job.membership.look()
    await job.wait_ready(2)
    asked = asyncio.Event()

    async def die_once_fewer_are_wanted(_: rollout_pb2.GenerateRequest) -> None:
        set_wanted_replicas(job.run_dir, 1)
        await job.membership.look()
        asked.set()
        raise RuntimeError("ended in the middle")

    job.servers[1].before = die_once_fewer_are_wanted
    groups = await asyncio.gather(*(job.pool.generate(request(str(index))) for index in range(2)))
    assert asked.is_set() and [len(group) for group in groups] == [2, 2]


async def test_one_that_went_away_by_itself_is_forgotten_and_may_come_back_elsewhere(job: Job) -> None:
    announce_rollout(job.run_dir, "1", job.addresses[1])
    set_wanted_replicas(job.run_dir, 2)
    await job.membership.look()
    await job.wait_ready(2)
    withdraw_rollout(job.run_dir, "1")
    await job.membership.look()
    assert job.pool.num_ready == 1 and job.pool.num_wanted == 2
    announce_rollout(job.run_dir, "1", job.addresses[2])
    await job.membership.look()
    await job.wait_ready(2)
    await asyncio.gather(*(job.pool.generate(request(str(index))) for index in range(4)))
    assert job.answered() == [2, 0, 2]
