"""Waiting for weights, and models and event loop staying out of each other's way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from probe_world import probe_by_hand
from prometheus_client import CollectorRegistry
from scoring_world import World, make_world, sample_group, until

from jackpot.errors import DeadlineError, ScoringError
from jackpot.scorer.engine import ScoringEngine
from jackpot.scorer.service import make_engine
from jackpot.scorer.target import PendingWeights
from jackpot.telemetry import Metrics


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


@pytest.fixture
def engine(world: World) -> Iterator[ScoringEngine]:
    engine = world.engine(world.job())
    yield engine
    engine.close()


async def test_nothing_is_scored_before_there_are_weights(world: World, engine: ScoringEngine) -> None:
    with pytest.raises(ScoringError, match="no version of the policy's weights"):
        await engine.score([sample_group(world)])
    await engine.refresh()
    assert (engine.version, engine.tokens_scored) == (0, 0)
    await engine.score([sample_group(world, lengths=(5, 3))])
    assert engine.tokens_scored == 8


async def test_a_version_that_comes_is_waited_for_and_one_that_does_not_is_named(
    world: World, engine: ScoringEngine
) -> None:
    waiting = asyncio.create_task(engine.wait_for_version(2, timeout_seconds=20))
    await engine.wait_for_version(0, timeout_seconds=20)
    assert not waiting.done()
    world.publish_policy(2)
    await waiting
    assert engine.version == 2
    with pytest.raises(
        DeadlineError, match=r"waited 0.1 s for version 3 of the policy's weights \(version 2 is held\)"
    ):
        await engine.wait_for_version(3, timeout_seconds=0.1)


async def test_followed_weights_change_the_scores_between_two_batches(world: World, engine: ScoringEngine) -> None:
    group = sample_group(world)
    following = asyncio.create_task(engine.follow())

    async def version_is(version: int) -> bool:
        return engine.version == version

    await until(lambda: version_is(0), "version 0")
    (old,) = await engine.score([group])
    world.publish_policy(1)
    await until(lambda: version_is(1), "version 1")
    (new,) = await engine.score([group])
    following.cancel()
    assert (old.policy_version, new.policy_version) == (0, 1)
    assert abs(old.scores[0].target_logprobs - new.scores[0].target_logprobs).max() > 0.1


async def test_groups_of_two_versions_take_turns_without_another_look_at_the_store(
    world: World, engine: ScoringEngine
) -> None:
    group = sample_group(world)
    await engine.refresh()
    world.publish_policy(1)
    await engine.refresh()
    world.damage_policy(0)  # what is in memory stays as it was
    world.damage_policy(1)
    scored = [(await engine.score([group], version))[0] for version in (0, 1, 0, 1)]
    assert [each.policy_version for each in scored] == [0, 1, 0, 1]
    logprobs = [each.scores[0].target_logprobs for each in scored]
    assert (logprobs[0] == logprobs[2]).all() and (logprobs[1] == logprobs[3]).all()
    assert abs(logprobs[0] - logprobs[1]).max() > 0.1


async def test_a_pruned_version_is_replaced_by_the_newest(world: World, engine: ScoringEngine) -> None:
    for version in (1, 2, 3):
        world.publish_policy(version)
    await engine.refresh()
    world.store.prune("policy", keep=2)
    (scored,) = await engine.score([sample_group(world)], 1)
    assert (scored.policy_version, engine.version) == (3, 3)


async def test_a_damaged_version_is_counted_once_and_an_intact_one_never(world: World) -> None:
    registry = CollectorRegistry()
    engine = make_engine(world.environment(), world.job(), Metrics("job-1", registry))

    def refused() -> float:
        return registry.get_sample_value("jackpot_weights_refused_total", {"job_id": "job-1", "role": "policy"}) or 0.0

    for _ in range(2):
        await engine.refresh()
        assert (engine.version, refused()) == (0, 0.0)
    world.publish_policy(1)
    world.damage_policy(1)
    await engine.refresh()
    assert (engine.version, refused()) == (0, 1.0)
    engine.close()


async def test_a_version_that_does_not_give_its_probe_is_counted_and_another_stands_in(world: World) -> None:
    registry = CollectorRegistry()
    engine = make_engine(world.environment(), world.job(), Metrics("job-1", registry))
    group = sample_group(world)
    await engine.refresh()
    (before,) = await engine.score([group])
    world.publish_policy(1, probe=probe_by_hand(world.policies[0], world.policies[0]).as_json())  # of version 0
    await engine.refresh()
    (scored,) = await engine.score([group], 1)
    assert (scored.policy_version, engine.version) == (0, 0)
    assert (scored.scores[0].target_logprobs == before.scores[0].target_logprobs).all()
    labels = {"job_id": "job-1", "role": "policy"}
    assert registry.get_sample_value("jackpot_weights_refused_total", labels) == 1
    engine.close()


async def test_the_event_loop_stays_live_while_scoring(world: World, engine: ScoringEngine) -> None:
    await engine.refresh()
    group = sample_group(world, lengths=(40,) * 4, prompt_length=20)
    scoring = asyncio.create_task(engine.score([group]))
    turns = 0
    while not scoring.done():
        await asyncio.sleep(0)
        turns += 1
    await scoring
    assert turns > 2


async def test_scoring_goes_on_while_a_large_version_is_read(
    world: World, engine: ScoringEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await engine.refresh_soon()
    assert engine.version == 0
    world.publish_policy(1)
    go, read = threading.Event(), engine._target.read_newer

    def read_slowly() -> PendingWeights | None:
        assert go.wait(20)
        return read()

    monkeypatch.setattr(engine._target, "read_newer", read_slowly)
    for _ in range(2):  # the second finds the reading of the first under way
        await engine.refresh_soon()
        (scored,) = await engine.score([sample_group(world)])
        assert scored.policy_version == 0
    go.set()

    async def taken_up() -> bool:
        await engine.refresh_soon()
        return engine.version == 1

    await until(taken_up, "version 1")
