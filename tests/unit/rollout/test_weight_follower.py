"""An engine follows the newest intact version of its role."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from patience import PATIENCE_SECONDS, TEST_SECONDS
from rollout_world import publish_damaged

from jackpot.compute.model_loading import load_causal_lm
from jackpot.compute.model_weights import save_weights
from jackpot.errors import DeadlineError
from jackpot.rollout.engine import RolloutEngine
from jackpot.rollout.weight_follower import WeightFollower
from jackpot.storage.weights import WeightStore

pytestmark = pytest.mark.timeout(TEST_SECONDS)


@pytest.fixture
def engine_name() -> str:
    """One architecture is enough here."""
    return "transformers-qwen3"


class World:
    """A store, an engine that follows it, and what the follower told."""

    def __init__(
        self,
        engine: RolloutEngine,
        root: Path,
        make_model: Callable[..., Path],
        poll_seconds: float,
        on_demand: bool = False,
    ) -> None:
        self.engine = engine
        self.root, self.store = root, WeightStore(root)
        self.loaded: list[int] = []
        self.refused: list[int] = []
        self._make_model = make_model
        self.follower = WeightFollower(
            engine,
            self.store,
            "actor",
            poll_seconds,
            on_demand,
            on_loaded=lambda version, seconds: self.loaded.append(version),
            on_refused=self.refused.append,
        )

    def publish(self, version: int, *, intact: bool = True, **settings: int) -> Path:
        model = load_causal_lm(self._make_model(seed=version % 3, **settings), "float32", "cpu")
        publish = self.store.publish if intact else partial(publish_damaged, self.root)
        publish("actor", version, lambda directory: save_weights(model, directory), {})
        return self.root / "actor" / f"{version:08d}"

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.follower.follow())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@pytest.fixture
def make_world(
    start_engine: Callable[..., RolloutEngine], tmp_path: Path, make_model: Callable[..., Path]
) -> Callable[..., World]:
    def make(poll_seconds: float = 0.005, on_demand: bool = False) -> World:
        return World(start_engine(), tmp_path / "weights", make_model, poll_seconds, on_demand)

    return make


async def test_new_versions_are_taken_up_as_they_appear(make_world: Callable[..., World]) -> None:
    world = make_world()
    async with world.following():
        world.publish(0)
        assert await world.follower.wait_for(0, PATIENCE_SECONDS) == 0
        world.publish(4)
        assert await world.follower.wait_for(1, PATIENCE_SECONDS) == 4
    assert world.loaded == [0, 4]


async def test_waiting_has_the_store_looked_at_at_once(make_world: Callable[..., World]) -> None:
    world = make_world(poll_seconds=3600)
    async with world.following():
        await asyncio.sleep(0)
        world.publish(2)
        assert await world.follower.newest() == 2
        assert await world.follower.wait_for(2, PATIENCE_SECONDS) == 2


async def test_on_demand_only_versions_that_somebody_waits_for_are_loaded(make_world: Callable[..., World]) -> None:
    world = make_world(on_demand=True)
    async with world.following():
        world.publish(0)
        assert await world.follower.wait_for(0, PATIENCE_SECONDS) == 0
        waiting = asyncio.create_task(world.follower.wait_for(5, PATIENCE_SECONDS))
        await asyncio.sleep(0)
        for version in (5, 6, 7):  # the first is waited for from before it is there
            world.publish(version)
            assert await waiting == 5
            await asyncio.sleep(0.05)  # ten times what it takes to look again
        assert await world.follower.wait_for(6, PATIENCE_SECONDS) == 7
    assert world.loaded == [0, 5, 7]


async def test_waiting_in_vain_says_for_what(make_world: Callable[..., World]) -> None:
    world = make_world()
    async with world.following():
        assert await world.follower.newest() == -1
        with pytest.raises(
            DeadlineError, match=r"waited 0\.05 s for version 0 of the actor's weights \(none is held\)"
        ):
            await world.follower.wait_for(0, 0.05)
        world.publish(1)
        await world.follower.wait_for(1, PATIENCE_SECONDS)
        with pytest.raises(DeadlineError, match=r"version 2 of the actor's weights \(version 1 is held\)"):
            await world.follower.wait_for(2, 0.05)


async def test_a_damaged_version_is_refused_once_and_skipped(
    make_world: Callable[..., World], until: Callable[..., object], caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world()
    async with world.following():
        world.publish(1)
        await world.follower.wait_for(1, PATIENCE_SECONDS)
        world.publish(2, intact=False)
        await until(lambda: world.refused == [2], "version 2 to be refused")  # type: ignore[misc]
        with pytest.raises(DeadlineError, match=r"\(version 1 is held; refused: \[2\]\)"):
            await world.follower.wait_for(2, 0.1)
        assert world.engine.version == 1
        world.publish(3)
        assert await world.follower.wait_for(2, PATIENCE_SECONDS) == 3
    assert world.refused == [2]
    assert world.loaded == [1, 3]
    (error,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert error.startswith("version 2 is refused, version 1 stays in use: ")
    assert "does not match its manifest" in error


async def test_a_version_of_another_model_is_refused(
    make_world: Callable[..., World], until: Callable[..., object]
) -> None:
    world = make_world()
    async with world.following():
        world.publish(1)
        await world.follower.wait_for(1, PATIENCE_SECONDS)
        world.publish(2, hidden_size=16)
        await until(lambda: world.refused == [2], "version 2 to be refused")  # type: ignore[misc]
    assert world.engine.version == 1


async def test_a_newcomer_takes_the_newest_intact_version(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.publish(5)
    world.publish(6)
    world.publish(7, intact=False)
    async with world.following():
        assert await world.follower.wait_for(0, PATIENCE_SECONDS) == 6
    assert world.refused == [7]


async def test_a_lost_version_is_waited_out(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.publish(1)
    lost = world.publish(2)
    lost.rename(lost.with_name("elsewhere"))
    async with world.following():
        with pytest.raises(DeadlineError):
            await world.follower.wait_for(2, 0.05)
        world.publish(3)
        assert await world.follower.wait_for(2, PATIENCE_SECONDS) == 3
    assert world.refused == []
