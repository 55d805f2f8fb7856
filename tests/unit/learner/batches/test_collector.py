"""Batches from a real bus: the next one is gathered beforehand, and waits end loudly."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from jackpot.bus import TrajectoryBus
from jackpot.config import JobSpec
from jackpot.errors import DeadlineError
from jackpot.learner.batches.collector import BatchCollector
from jackpot.trajectory import ScoredGroup

from ..conftest import put


@pytest.fixture
def job(make_job: Callable[..., JobSpec]) -> JobSpec:
    return make_job("learner.groups_per_batch=2", "learner.batch_timeout_seconds=1.5")


@pytest.fixture
async def bus(job: JobSpec, valkey_url: str, tmp_path: Path) -> AsyncIterator[TrajectoryBus]:
    bus = await TrajectoryBus.connect(valkey_url, tmp_path.name.replace("_", "-")[:40], job.bus, "learner-0", tmp_path)
    await bus.open()
    yield bus
    await bus.close()


async def test_the_next_batch_is_there_when_it_is_asked_for(
    job: JobSpec, bus: TrajectoryBus, make_groups: Callable[..., list[ScoredGroup]], tmp_path: Path
) -> None:
    job_id, groups = tmp_path.name.replace("_", "-")[:40], make_groups(job)
    collector = BatchCollector(job, bus)
    ids = [await put(bus, job_id, groups, slot) for slot in (1, 0)]
    first = await collector.collect(0, lambda: False)
    assert first is not None
    assert [group.group_id for group in first.groups] == [ids[1], ids[0]]  # in slot order
    assert first.batch.num_tokens == sum(group.group.num_tokens for group in first.groups)
    collector.prefetch(1)
    ids = [await put(bus, job_id, groups, slot) for slot in (2, 3)]
    second = await collector.collect(1, lambda: False)
    assert second is not None
    assert [group.group_id for group in second.groups] == ids


async def test_what_is_delivered_again_of_a_batch_already_trained_keeps_its_lease_until_the_commit(
    job: JobSpec, bus: TrajectoryBus, valkey_url: str, make_groups: Callable[..., list[ScoredGroup]], tmp_path: Path
) -> None:
    """As after a crash between the training of batch 0 and its checkpoint: it is trained from its manifest."""
    job_id, groups = tmp_path.name.replace("_", "-")[:40], make_groups(job)
    old = [await put(bus, job_id, groups, slot) for slot in (0, 1)]
    assert len(await bus.take_scored(2, 1.0)) == 2
    again = await TrajectoryBus.connect(valkey_url, job_id, job.bus, "learner-0", tmp_path)
    await again.open()
    new = [await put(bus, job_id, groups, slot) for slot in (2, 3)]
    collector = BatchCollector(job, again)
    second = await collector.collect(1, lambda: False)
    assert second is not None
    assert [group.group_id for group in second.groups] == new
    assert await again.renew() == []  # it holds all four
    await again.commit_trained(dict.fromkeys(old, 1))
    assert await again.renew() == []
    assert await again.readings.dispatched() == dict.fromkeys(new, "scored")
    await again.close()


async def test_waits_end_with_the_deadline_with_a_stop_or_with_a_failure_elsewhere(
    job: JobSpec, bus: TrajectoryBus
) -> None:
    collector = BatchCollector(job, bus)
    with pytest.raises(DeadlineError, match="0 of 2 groups are here"):
        await collector.collect(0, lambda: False)
    await collector.close()
    assert await collector.collect(0, lambda: True) is None

    def watch() -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        await collector.collect(0, lambda: False, watch)
    await collector.close()
