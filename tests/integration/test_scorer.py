"""The scoring service on a real bus and behind a real socket."""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patience import PATIENCE_SECONDS, TEST_SECONDS
from prometheus_client import CollectorRegistry
from scoring_world import World, expected_scores, make_world, sample_group, score_rounding, until

from jackpot.bus import TrajectoryBus
from jackpot.config import JobSpec
from jackpot.errors import DeadlineError, RequestRefusedError
from jackpot.rpc.channel import call, open_channel, wait_ready
from jackpot.rpc.proto import group_to_proto, scored_group_from_proto
from jackpot.scorer.engine import ScoringEngine
from jackpot.scorer.service import serve_groups
from jackpot.scorer.worker import ScorerWorker
from jackpot.telemetry import Metrics
from jackpot.trajectory import Group, ScoredGroup
from jackpot.v1 import scoring_pb2, scoring_pb2_grpc, weights_pb2

pytestmark = pytest.mark.timeout(TEST_SECONDS)

# The slot is then the batch, the step at which it begins to train, and a version more than the one that scores it.
ONE_GROUP_A_BATCH: dict[str, Any] = {"learner": {"groups_per_batch": 1}}
ARRAYS = ("target_logprobs", "acceptance_probs", "mask", "normalizer_head", "normalizer_tail", "topk_mass")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


@pytest.fixture
def job_id() -> str:
    return f"scorer-{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def bus(valkey_url: str, job_id: str, world: World) -> AsyncIterator[TrajectoryBus]:
    """The orchestrator's and the learner's side of the bus."""
    bus = await TrajectoryBus.connect(valkey_url, job_id, world.job().bus, "test", world.run_dir / "payloads")
    await bus.open()
    yield bus
    await bus.close()


@asynccontextmanager
async def working(
    world: World, url: str, job_id: str, job: JobSpec, instance: str = "0"
) -> AsyncIterator[ScoringEngine]:
    """A worker on the bus, stopped as SIGTERM stops it."""
    engine = world.engine(job)
    await engine.refresh()
    bus = await TrajectoryBus.connect(url, job_id, job.bus, f"scorer-{instance}", world.run_dir / "payloads")
    await bus.open()
    stop = asyncio.Event()
    task = asyncio.create_task(ScorerWorker(job, bus, engine, stop).run())
    try:
        yield engine
    finally:
        stop.set()
        await asyncio.wait_for(task, PATIENCE_SECONDS)
        await bus.close()
        engine.close()


async def publish(bus: TrajectoryBus, *groups: Group) -> None:
    for group in groups:
        assert await bus.reserve(group.group_id, 100_000)
        assert await bus.publish(group) == "published"


async def scored_groups(bus: TrajectoryBus, count: int) -> dict[str, ScoredGroup]:
    found: dict[str, ScoredGroup] = {}

    async def enough() -> bool:
        found.update((delivery.group_id, delivery.value) for delivery in await bus.take_scored(count, 0.5))
        return len(found) >= count

    await until(enough, f"{count} scored groups")
    return found


def assert_same_scores(world: World, left: ScoredGroup, right: ScoredGroup) -> None:
    assert (left.obrs_lambda, left.policy_version, left.normalizer) == (
        right.obrs_lambda,
        right.policy_version,
        right.normalizer,
    )
    for one, other in zip(left.scores, right.scores, strict=True):
        atol = score_rounding(world, other.target_logprobs)
        for name in ARRAYS:
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=0, atol=atol, err_msg=name)


async def test_what_goes_in_as_groups_comes_out_scored(
    world: World, bus: TrajectoryBus, valkey_url: str, job_id: str
) -> None:
    groups = [sample_group(world, job_id=job_id, slot=slot, lengths=(slot + 2, 3)) for slot in range(5)]
    await publish(bus, *groups)
    async with working(world, valkey_url, job_id, world.job()):
        found = await scored_groups(bus, 5)
    for group in groups:
        scored = found[group.group_id]
        assert all(t.topk_ids is None for t in scored.group.trajectories)
        expected = expected_scores(
            world, group, group.trajectories[0], policy_version=0, normalizer="tail", obrs_lambda=1.0, top_k=20
        )
        atol = score_rounding(world, expected.target_logprobs)
        for name in ("target_logprobs", "normalizer_head"):
            np.testing.assert_allclose(getattr(scored.scores[0], name), getattr(expected, name), rtol=0, atol=atol)
    assert (await bus.readings.ledger()).open == 5 and (await bus.readings.depths()).rollouts_pending == 0


async def test_a_trajectory_gets_the_same_mask_whichever_worker_scores_it(
    world: World, bus: TrajectoryBus, valkey_url: str, job_id: str
) -> None:
    group = sample_group(world, job_id=job_id, lengths=(40, 40))
    masks = []
    for instance in ("0", "1"):
        id_of_this_run = f"{job_id}-{instance}"
        own = await TrajectoryBus.connect(
            valkey_url, id_of_this_run, world.job().bus, "test", world.run_dir / "payloads"
        )
        await own.open()
        # Same trajectory ids: the group is redelivered, so to say, on another bus.
        await publish(own, replace(group, group_id=group.group_id.replace(job_id, id_of_this_run)))
        async with working(world, valkey_url, id_of_this_run, world.job(), instance):
            (scored,) = (await scored_groups(own, 1)).values()
        masks.append(np.concatenate([scores.mask for scores in scored.scores]))
        await own.close()
    np.testing.assert_array_equal(*masks)
    assert 0 < masks[0].mean() < 1


async def test_a_group_older_than_allowed_is_dropped_as_stale(
    world: World, bus: TrajectoryBus, valkey_url: str, job_id: str
) -> None:
    world.publish_policy(3)
    for version in (2, 3):
        world.publish_actor(version)
    stale = sample_group(world, job_id=job_id, slot=3, versions=(0, 2))
    fresh = sample_group(world, job_id=job_id, slot=4, versions=(3,))
    await publish(bus, stale, fresh)
    async with working(world, valkey_url, job_id, world.job(**ONE_GROUP_A_BATCH)):
        assert set(await scored_groups(bus, 1)) == {fresh.group_id}
        await until(lambda: bus.readings.terminal_states([stale.group_id]), "the stale group to be dropped")
    assert await bus.readings.terminal_states([stale.group_id]) == {stale.group_id: "dropped:stale"}
    ((_, record),) = await bus.readings.read_terminal("", 10)
    assert record.detail == "3 versions old where step 3 trains on it, 1 are allowed"


async def test_each_batch_is_scored_by_its_own_version_however_groups_come(
    world: World, bus: TrajectoryBus, valkey_url: str, job_id: str
) -> None:
    """Batches of one group and an age of one: slot 1 needs version 0, slot 2 version 1, slot 3 version 2."""
    for version in (1, 2):
        world.publish_policy(version, obrs_lambda=1.0 + version)
        world.publish_actor(version)
    groups = [
        sample_group(world, job_id=job_id, slot=slot, versions=(max(0, slot - 1),), dispatch_version=max(0, slot - 1))
        for slot in range(4)
    ]
    async with working(world, valkey_url, job_id, world.job(**ONE_GROUP_A_BATCH)):
        for order in ((3, 1), (2, 0)):
            await publish(bus, *(groups[slot] for slot in order))
            scored = await scored_groups(bus, 2)
            for slot in order:
                found = scored[groups[slot].group_id]
                assert found.policy_version == max(0, slot - 1)
                assert found.obrs_lambda == (1.0 if slot < 2 else float(slot))
                scores, trajectory = found.scores[0], groups[slot].trajectories[0]
                version = found.policy_version
                expected = expected_scores(
                    world,
                    groups[slot],
                    trajectory,
                    policy_version=version,
                    normalizer="tail",
                    obrs_lambda=found.obrs_lambda,
                    top_k=20,
                )
                allowed = score_rounding(world, expected.target_logprobs)
                np.testing.assert_allclose(scores.target_logprobs, expected.target_logprobs, rtol=0, atol=allowed)


async def test_groups_of_an_older_batch_do_not_wait_behind_those_whose_version_is_to_come(
    world: World, bus: TrajectoryBus, valkey_url: str, job_id: str
) -> None:
    """The late one is what training, and with it the version that the others wait for, needs."""
    settings = ONE_GROUP_A_BATCH | {"scorer": {"reference_age": 0}, "bus": {"lease_seconds": 1.5}}
    early, late = (sample_group(world, job_id=job_id, slot=slot) for slot in (1, 0))
    async with working(world, valkey_url, job_id, world.job(**settings)) as engine:
        await publish(bus, early)

        async def taken() -> bool:
            return (await bus.readings.depths()).rollouts_pending == 1

        await until(taken, "the early group to be taken")
        await publish(bus, late)
        (first,) = (await scored_groups(bus, 1)).values()
        assert (first.group_id, first.policy_version) == (late.group_id, 0)
        assert engine.version == 0 and not await bus.readings.terminal_states([early.group_id])
        world.publish_policy(1)
        (second,) = (await scored_groups(bus, 1)).values()
    assert (second.group_id, second.policy_version) == (early.group_id, 1)


async def test_a_group_whose_actor_version_is_gone_is_dropped_as_stale(
    world: World, bus: TrajectoryBus, valkey_url: str, job_id: str
) -> None:
    world.publish_actor(1)
    gone, there = (
        sample_group(world, job_id=job_id, slot=slot, versions=(version,)) for slot, version in ((0, 0), (1, 1))
    )
    world.store.prune("actor", keep=1)
    await publish(bus, gone, there)
    async with working(world, valkey_url, job_id, world.job({"name": "jackpot", "normalizer": "union_tail"})):
        assert set(await scored_groups(bus, 1)) == {there.group_id}
        await until(lambda: bus.readings.terminal_states([gone.group_id]), "the group to be dropped")
    assert await bus.readings.terminal_states([gone.group_id]) == {gone.group_id: "dropped:stale"}


async def test_a_group_waits_for_its_version_and_others_do_not_wait_with_it(
    world: World, bus: TrajectoryBus, valkey_url: str, job_id: str
) -> None:
    world.publish_actor(1)
    early = sample_group(world, job_id=job_id, slot=2, versions=(1,), dispatch_version=1)
    ready = sample_group(world, job_id=job_id, slot=1)
    await publish(bus, early, ready)
    # A lease that is shorter than the wait: only renewal keeps the group.
    job = world.job(**ONE_GROUP_A_BATCH | {"bus": {"lease_seconds": 1.5}})
    async with working(world, valkey_url, job_id, job) as engine:
        (first,) = (await scored_groups(bus, 1)).values()
        assert (first.group_id, first.policy_version) == (ready.group_id, 0)
        await asyncio.sleep(3.0)  # the lease's length, twice
        assert (await bus.readings.depths()).rollouts_pending == 1 and engine.version == 0
        world.publish_policy(1, obrs_lambda=0.7)
        (second,) = (await scored_groups(bus, 1)).values()
    assert (second.group_id, second.policy_version, second.obrs_lambda) == (early.group_id, 1, 0.7)


async def test_a_version_that_never_comes_ends_the_group_by_name(
    world: World, bus: TrajectoryBus, valkey_url: str, job_id: str
) -> None:
    group = sample_group(world, job_id=job_id, slot=10, dispatch_version=9)
    await publish(bus, group)
    settings = {"scorer": {"version_timeout_seconds": 0.1}, "bus": {"max_attempts": 2}}
    job = world.job(**ONE_GROUP_A_BATCH | settings)
    async with working(world, valkey_url, job_id, job):
        await until(lambda: bus.readings.terminal_states([group.group_id]), "the group's end")
    ((_, record),) = await bus.readings.read_terminal("", 10)
    assert record.reason == "scoring_failed"
    assert "waited 0.1 s for version 9 of the policy's weights (version 0 is the newest)" in record.detail


async def test_a_stopped_worker_gives_back_what_waits_for_its_version(
    world: World, bus: TrajectoryBus, valkey_url: str, job_id: str
) -> None:
    """At once, not when its lease ends, and it costs the group no attempt."""
    early, ready = (sample_group(world, job_id=job_id, slot=slot, dispatch_version=0) for slot in (2, 1))
    await publish(bus, early, ready)
    async with working(world, valkey_url, job_id, world.job(**ONE_GROUP_A_BATCH)):
        await scored_groups(bus, 1)  # of the two that were taken together, the one that can be
        assert (await bus.readings.depths()).rollouts_pending == 1
    (delivery,) = await bus.take_groups(1, 5.0)  # a sixth of the lease
    assert (delivery.group_id, delivery.attempt) == (early.group_id, 1)


async def test_groups_that_cannot_be_scored_do_not_take_their_neighbours_along(
    world: World, bus: TrajectoryBus, valkey_url: str, job_id: str
) -> None:
    good = [sample_group(world, job_id=job_id, slot=slot) for slot in (0, 1, 2)]
    unreadable, unscorable = (sample_group(world, job_id=job_id, slot=slot) for slot in (3, 4))
    first, *others = unscorable.trajectories
    beyond = replace(first, token_ids=np.full(first.num_tokens, 1_000_000, dtype=np.uint32))
    await publish(bus, good[0], unreadable, good[1], replace(unscorable, trajectories=(beyond, *others)), good[2])
    damaged = [path for path in (world.run_dir / "payloads").rglob("*") if path.is_file() and ".s3." in path.name]
    assert len(damaged) == 1
    damaged[0].write_bytes(damaged[0].read_bytes()[:-7] + b"garbage")
    async with working(world, valkey_url, job_id, world.job()):
        assert set(await scored_groups(bus, 3)) == {group.group_id for group in good}
        bad = [unreadable.group_id, unscorable.group_id]

        async def both_ended() -> bool:
            return len(await bus.readings.terminal_states(bad)) == 2

        await until(both_ended, "both bad groups to end")
    assert await bus.readings.terminal_states(bad) == {
        bad[0]: "dropped:corrupt_payload",
        bad[1]: "dropped:scoring_failed",
    }
    details = [
        record.detail for _, record in await bus.readings.read_terminal("", 10) if record.reason == "scoring_failed"
    ]
    assert details == [
        f"PayloadError: trajectory {beyond.trajectory_id}: it has no tokens, or ids beyond the vocabulary, 97."
    ]


async def test_scores_of_a_group_that_another_worker_took_over_are_thrown_away(
    world: World, bus: TrajectoryBus, valkey_url: str, job_id: str
) -> None:
    world.publish_actor(1)
    group = sample_group(world, job_id=job_id, slot=2, versions=(1,), dispatch_version=1)
    async with working(world, valkey_url, job_id, world.job(**ONE_GROUP_A_BATCH)) as engine:
        waits, refresh_soon = asyncio.Event(), engine.refresh_soon

        async def note_and_refresh() -> None:  # what a worker does that has groups
            waits.set()
            await refresh_soon()

        engine.refresh_soon = note_and_refresh  # type: ignore[method-assign]
        await publish(bus, group)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await waits.wait()  # the worker has read the group; its entry alone being taken would not tell that
        await bus.drop(group.group_id, "lost", "ended behind the worker's back")
        world.publish_policy(1)

        async def scored() -> bool:
            return engine.tokens_scored == group.num_tokens

        await until(scored, "the group to be scored")
        other = sample_group(world, job_id=job_id, slot=1)
        await publish(bus, other)
        assert set(await scored_groups(bus, 1)) == {other.group_id}
    assert await bus.readings.terminal_states([group.group_id]) == {group.group_id: "dropped:lost"}


@pytest.fixture
def socket() -> Any:
    with tempfile.TemporaryDirectory() as directory:  # a unix socket's path must be short
        yield f"unix:{directory}/scorer.sock"


async def test_the_rpc_and_the_worker_say_the_same(
    world: World, bus: TrajectoryBus, valkey_url: str, job_id: str, socket: str
) -> None:
    job = world.job({"name": "jackpot", "normalizer": "union_tail", "obrs_lambda": 0.9})
    environment = world.environment(job_id=job_id, redis_url=valkey_url, listen=socket)
    stop = asyncio.Event()
    service = asyncio.create_task(serve_groups(environment, job, stop, Metrics(job_id, CollectorRegistry())))
    group = sample_group(world, job_id=job_id, lengths=(6, 2, 9))
    async with open_channel(socket) as channel:
        await wait_ready(channel, "jackpot.v1.ScoringService", PATIENCE_SECONDS)
        stub = scoring_pb2_grpc.ScoringServiceStub(channel)

        async def ask(method: Any, request: Any, seconds: float = PATIENCE_SECONDS) -> Any:
            return await call(method, request, seconds, awaited="the scorer")

        answer = await ask(stub.Score, scoring_pb2.ScoreRequest(group=group_to_proto(group)))
        by_rpc = scored_group_from_proto(group, answer)
        await publish(bus, group)
        (by_worker,) = (await scored_groups(bus, 1)).values()
        assert_same_scores(world, by_rpc, by_worker)

        status = await ask(stub.GetStatus, scoring_pb2.ScoringServiceGetStatusRequest())
        assert (status.version, status.tokens_scored) == (0, 2 * group.num_tokens)
        assert status.obrs_lambda == pytest.approx(0.9)
        world.publish_policy(4)
        newest = scoring_pb2.ScoringServiceLoadWeightsRequest(weights=weights_pb2.LoadWeightsRequest(min_version=0))
        assert (await ask(stub.LoadWeights, newest)).weights.version == 4
        too_new = scoring_pb2.ScoringServiceLoadWeightsRequest(weights=weights_pb2.LoadWeightsRequest(min_version=5))
        with pytest.raises(DeadlineError):
            await ask(stub.LoadWeights, too_new, seconds=0.2)
        message = group_to_proto(replace(group, temperature=0.0))
        with pytest.raises(RequestRefusedError, match=r"temperature 0\.0 is not positive"):
            await ask(stub.Score, scoring_pb2.ScoreRequest(group=message))
    stop.set()
    assert await asyncio.wait_for(service, PATIENCE_SECONDS) == 0
