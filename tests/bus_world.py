"""Groups to put on a bus, and the invariants that must hold on it after every fault."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from patience import PATIENCE_SECONDS
from redis.asyncio import Redis

from jackpot.bus import Delivery, Ledger, TrajectoryBus
from jackpot.config import BusConfig
from jackpot.trajectory import Group, GroupKey, ScoredGroup, TokenScores, Trajectory, VersionSpan, deferred

STORES = ("redis", "file")


def make_group(job_id: str, slot: int = 0, *, tokens: int = 6, top_k: int | None = 3, size: int = 2) -> Group:
    """A valid group with arrays that depend on its slot; ``size`` trajectories of about ``tokens`` tokens."""
    rng = np.random.default_rng(slot)
    key = GroupKey(slot=slot, epoch=0, prompt_index=slot)
    group_id = key.group_id(job_id)

    def trajectory(index: int) -> Trajectory:
        length = tokens + index
        return Trajectory(
            trajectory_id=f"{group_id}#{index}",
            token_ids=rng.integers(0, 2**32, length, dtype=np.uint32),
            actor_logprobs=-rng.random(length, dtype=np.float32),
            topk_ids=None if top_k is None else rng.integers(0, 2**32, (length, top_k), dtype=np.uint32),
            topk_logprobs=None if top_k is None else -rng.random((length, top_k)).astype(np.float16),
            version_spans=(VersionSpan(3, 0, 2), VersionSpan(4, 2, length)),
            finish_reason="stop" if index % 2 else "length",
            reward=None if index == 0 else 0.5 * index,
        )

    return Group(
        group_id=group_id,
        prompt_index=slot,
        prompt_token_ids=rng.integers(0, 2**32, 4, dtype=np.uint32),
        trajectories=tuple(trajectory(index) for index in range(size)),
        temperature=0.75,
        dispatch_version=4,
        metadata={"task": "complement", "slot": slot, "nested": {"list": [1, 2.5, None, "ä"]}},
    )


def make_scored(group: Group) -> ScoredGroup:
    """The group with made-up but valid scores."""

    def scores(length: int) -> TokenScores:
        rng = np.random.default_rng(length)
        return TokenScores(
            target_logprobs=-rng.random(length, dtype=np.float32),
            acceptance_probs=rng.random(length, dtype=np.float32),
            mask=rng.random(length) < 0.5,
            normalizer_head=rng.random(length, dtype=np.float32),
            normalizer_tail=rng.random(length, dtype=np.float32),
            topk_mass=rng.random(length, dtype=np.float32),
        )

    return ScoredGroup(
        group=group,
        scores=tuple(scores(trajectory.num_tokens) for trajectory in group.trajectories),
        obrs_lambda=1.25,
        policy_version=5,
        normalizer="tail",
    )


def plain(value: Any) -> Any:
    """Nested tuples of a value from jackpot.trajectory, to compare with ==; arrays with their dtype."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if hasattr(value, "__dataclass_fields__"):
        return tuple(plain(getattr(value, name)) for name in value.__dataclass_fields__)
    return value


def bus_settings(store: str, **settings: Any) -> BusConfig:
    """A bus section with short leases."""
    return BusConfig.model_validate({"payload_store": store, "lease_seconds": 0.3, "max_bytes": 1 << 20, **settings})


async def eventually(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    """Wait until the condition holds; fails, naming what was awaited, if it takes too long."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not await condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS:g} s for {what}"
        await asyncio.sleep(0.01)


async def assert_closed(bus: TrajectoryBus, url: str, job_id: str, payload_dir: Path, dispatched: set[str]) -> Ledger:
    """Every dispatched group has one terminal state, the counters add up, and nothing is left behind."""
    ledger = await bus.readings.ledger()
    assert ledger.open == 0
    assert ledger.dispatched == len(dispatched) == ledger.trained + sum(ledger.dropped.values())
    records = [record for _, record in await bus.readings.read_terminal("", 1_000_000)]
    assert len(records) == len(dispatched)
    assert {record.group_id for record in records} == dispatched
    assert sum(record.state == "trained" for record in records) == ledger.trained
    states = await bus.readings.terminal_states(sorted(dispatched))
    for record in records:
        assert states[record.group_id] == (f"dropped:{record.reason}" if record.reason else "trained")

    depths = await bus.readings.depths()
    assert depths.bytes_used == 0
    assert (depths.rollouts_waiting, depths.rollouts_pending) == (0, 0)
    assert (depths.scored_waiting, depths.scored_pending) == (0, 0)
    async with Redis.from_url(url, decode_responses=True) as redis:
        keys = {key.rpartition(":")[2] async for key in redis.scan_iter(f"jackpot:{{{job_id}}}:*")}
    # No payload, and no hash about single groups, is left; empty streams keep their consumer groups.
    assert keys <= {"incarnation", "terminal", "counters", "values", "rollouts", "scored", "ledger"}, keys
    assert not [path for path in payload_dir.rglob("*") if path.is_file()]
    return ledger


def ids(deliveries: list[Delivery[Any]]) -> list[str]:
    return [delivery.group_id for delivery in deliveries]


class Job:
    """One job on the shared server: makes connections, and remembers what was dispatched."""

    def __init__(self, url: str, store: str, payload_dir: Path) -> None:
        self.url = url
        self.store = store
        self.payload_dir = payload_dir
        self.job_id = f"bus-{uuid.uuid4().hex[:12]}"
        self.dispatched: set[str] = set()

    @asynccontextmanager
    async def connect(
        self, consumer: str = "0", *, opened: bool = True, **settings: Any
    ) -> AsyncIterator[TrajectoryBus]:
        bus = await TrajectoryBus.connect(
            self.url, self.job_id, bus_settings(self.store, **settings), consumer, self.payload_dir
        )
        try:
            if opened:
                await bus.open()
            yield bus
        finally:
            await bus.close()

    def group(self, slot: int) -> Group:
        return make_group(self.job_id, slot)

    async def publish(self, bus: TrajectoryBus, *slots: int) -> list[str]:
        groups = [self.group(slot) for slot in slots]
        for group in groups:
            assert await bus.reserve(group.group_id, 5000)
            assert await bus.publish(group) == "published"
            self.dispatched.add(group.group_id)
        return [group.group_id for group in groups]

    async def publish_scored(self, bus: TrajectoryBus, *slots: int) -> list[str]:
        group_ids = await self.publish(bus, *slots)
        for _ in slots:
            (delivery,) = await bus.take_groups(1, 1.0)
            await bus.publish_scored(delivery, make_scored(delivery.value))
        return group_ids

    async def publish_deferred(self, bus: TrajectoryBus, *slots: int) -> list[str]:
        groups = [deferred(self.group(slot), 5) for slot in slots]
        for group in groups:
            assert await bus.reserve(group.group_id, 5000)
            assert await bus.publish_deferred(group) == "published"
            self.dispatched.add(group.group_id)
        return [group.group_id for group in groups]

    async def assert_closed(self, bus: TrajectoryBus) -> Ledger:
        return await assert_closed(bus, self.url, self.job_id, self.payload_dir, self.dispatched)
