"""The trajectory bus on a real server, with both payload stores."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from bus_world import STORES, assert_closed, bus_settings, make_group, make_scored, plain

from jackpot.runtime.bus import TrajectoryBus


@pytest.fixture
def job_id() -> str:
    return f"bus-{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def bus(valkey_url: str, job_id: str, store: str, tmp_path: Path) -> AsyncIterator[TrajectoryBus]:
    bus = await TrajectoryBus.connect(valkey_url, job_id, bus_settings(store), "0", tmp_path)
    await bus.open()
    yield bus
    await bus.close()


async def test_a_group_travels_from_dispatch_to_trained(
    bus: TrajectoryBus, valkey_url: str, job_id: str, tmp_path: Path
) -> None:
    group = make_group(job_id, 7)
    assert await bus.reserve(group.group_id, 5000)
    assert await bus.dispatched() == {group.group_id: "dispatched"}
    assert await bus.publish(group) == "published"
    assert await bus.dispatched() == {group.group_id: "published"}
    (taken,) = await bus.take_groups(4, 1.0)
    assert plain(taken.value) == plain(group)
    assert taken.attempt == 1
    scored = make_scored(taken.value)
    await bus.publish_scored(taken, scored)
    assert await bus.dispatched() == {group.group_id: "scored"}
    (ready,) = await bus.take_scored(4, 1.0)
    assert plain(ready.value) == plain(scored)
    assert await bus.commit_trained({group.group_id: 3}) == []
    ledger = await assert_closed(bus, valkey_url, job_id, tmp_path, {group.group_id})
    assert ledger.trained == 1
