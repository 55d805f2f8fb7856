"""The learner's loop on a real bus: leases while it trains, checkpoints one at a time, failures at once."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_SECONDS
from prometheus_client import CollectorRegistry

from jackpot.bus import TrajectoryBus
from jackpot.bus.kept_trajectories import KeptTrajectories
from jackpot.config import JobSpec
from jackpot.errors import DeadlineError, JackpotError
from jackpot.learner.checkpoints.checkpoint_store import CheckpointStore, PendingCheckpoint, Progress
from jackpot.learner.loop import Learner
from jackpot.learner.publishing.publisher import WeightPublisher
from jackpot.learner.reports.alarm_log import AlarmLog
from jackpot.learner.reports.step_log import StepLog
from jackpot.learner.trainer import Trainer
from jackpot.scoring.batch import Batch
from jackpot.storage.batch_manifests import ManifestLog
from jackpot.storage.run_directory import RunFiles
from jackpot.storage.weights import WeightStore
from jackpot.telemetry import Metrics
from jackpot.telemetry.activity import Activity

from .conftest import MakeGroups, MakeJob, MakeTrainer, put

ONE_GROUP = ("learner.groups_per_batch=1", "learner.checkpoint_every=1")


def nothing(*_: object) -> None:
    """Where a test does not look in."""


@dataclass(eq=False)
class WatchedTrainer:
    """The real trainer; a test looks in, or holds it up, before each batch and around each checkpoint."""

    trainer: Trainer
    before_batch: Callable[[int], None] = nothing
    before_checkpoint: Callable[[int], None] = nothing
    before_writing: Callable[[int], None] = nothing

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trainer, name)

    def train_batch(self, batch: Batch, first_step: int) -> list[dict[str, float]]:
        self.before_batch(first_step)
        return self.trainer.train_batch(batch, first_step)

    def begin_checkpoint(self, store: CheckpointStore, progress: Progress) -> Any:
        self.before_checkpoint(progress.step)
        return WatchedCheckpoint(self, progress.step, self.trainer.begin_checkpoint(store, progress))


@dataclass(eq=False)
class WatchedCheckpoint:
    """A checkpoint that is being written."""

    trainer: WatchedTrainer
    step: int
    pending: PendingCheckpoint

    def finish(self) -> Path:
        self.trainer.before_writing(self.step)
        return self.pending.finish()


@dataclass(eq=False)
class World:
    """A learner, its bus and what it writes."""

    job: JobSpec
    job_id: str
    url: str
    directory: Path
    bus: TrajectoryBus
    trainer: WatchedTrainer
    learner: Learner
    store: WeightStore
    tasks_before: set[asyncio.Task[Any]] = field(default_factory=asyncio.all_tasks)

    @asynccontextmanager
    async def another_bus(self) -> AsyncIterator[TrajectoryBus]:
        """That of another learner of the job."""
        bus = await TrajectoryBus.connect(self.url, self.job_id, self.job.bus, "learner-1", self.directory)
        try:
            await bus.open()
            yield bus
        finally:
            await bus.close()


@pytest.fixture
async def make_world(
    make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups, valkey_url: str, tmp_path: Path
) -> AsyncIterator[Callable[..., Any]]:
    """``await make_world(2, "learner.steps=2")``: a learner of a job with so many groups on the bus."""
    buses: list[TrajectoryBus] = []

    async def make(num_groups: int, *overrides: str) -> World:
        job, job_id = make_job(*ONE_GROUP, *overrides), tmp_path.name.replace("_", "-")[:40]
        bus = await TrajectoryBus.connect(valkey_url, job_id, job.bus, "learner-0", tmp_path)
        buses.append(bus)
        await bus.open()
        groups = make_groups(job, num_groups=num_groups)
        for slot in range(num_groups):
            await put(bus, job_id, groups, slot)
        files, metrics = RunFiles(tmp_path), Metrics(job_id, CollectorRegistry())
        checkpoints, store = CheckpointStore(files.checkpoints, keep=2), WeightStore(tmp_path / "weights")
        trainer: Any = WatchedTrainer(make_trainer(job))
        learner = Learner(
            job,
            bus,
            trainer,
            WeightPublisher(job, store, tmp_path, lambda: checkpoints.steps),
            checkpoints,
            ManifestLog(files.manifests),
            StepLog(tmp_path, metrics),
            AlarmLog(job.alarms, tmp_path, metrics),
            KeptTrajectories(tmp_path, job.bus.max_payload_bytes),
            Activity(metrics, "learner", "0", tmp_path),
        )
        return World(job, job_id, valkey_url, tmp_path, bus, trainer, learner, store)

    yield make
    for bus in buses:
        await bus.close()


async def test_groups_keep_their_leases_while_they_are_trained_on(make_world: Callable[..., Any]) -> None:
    """Training takes longer than two leases; another learner takes over what nobody renews."""
    world = await make_world(1, "learner.steps=1", "bus.lease_seconds=2")
    training, looked = threading.Event(), threading.Event()

    def hold(_: int) -> None:
        training.set()
        assert looked.wait(PATIENCE_SECONDS)

    world.trainer.before_batch = hold
    async with world.another_bus() as other, asyncio.TaskGroup() as tasks:
        run = tasks.create_task(world.learner.run(lambda: False))
        assert await asyncio.to_thread(training.wait, PATIENCE_SECONDS)
        try:
            taken = await other.take_scored(1, 5.0)  # two and a half leases
        finally:
            looked.set()
    assert taken == []
    assert run.result()
    assert (await world.bus.readings.ledger()).trained == 1


async def test_a_checkpoint_that_cannot_be_written_ends_the_job_while_it_waits_for_groups(
    make_world: Callable[..., Any],
) -> None:
    """And not only where the next checkpoint would begin, or where no group comes for too long."""
    world = await make_world(1, "learner.steps=2", "learner.batch_timeout_seconds=60")
    checkpoints = RunFiles(world.directory).checkpoints

    def lose_the_directory(_: int) -> None:
        shutil.rmtree(checkpoints)
        checkpoints.touch()

    world.trainer.before_writing = lose_the_directory
    with pytest.raises((JackpotError, OSError)) as caught:
        await world.learner.run(lambda: False)
    assert not isinstance(caught.value, DeadlineError)
    assert (await world.bus.readings.ledger()).trained == 0


async def test_checkpoints_are_written_one_at_a_time(make_world: Callable[..., Any]) -> None:
    world = await make_world(2, "learner.steps=2")
    seen: list[tuple[str, int]] = []
    second_trains, second_begins = threading.Event(), threading.Event()

    def begin(step: int) -> None:
        seen.append(("begins", step))
        if step == 2:
            second_begins.set()

    def write(step: int) -> None:
        if step == 1:
            assert second_trains.wait(PATIENCE_SECONDS)
            second_begins.wait(2.0)  # it should not
        seen.append(("is written", step))

    world.trainer.before_batch = lambda step: second_trains.set() if step == 1 else None
    world.trainer.before_checkpoint, world.trainer.before_writing = begin, write
    assert await world.learner.run(lambda: False)
    assert seen == [("begins", 1), ("is written", 1), ("begins", 2), ("is written", 2)]


async def test_without_overlap_a_version_is_published_before_the_next_batch(make_world: Callable[..., Any]) -> None:
    world = await make_world(3, "learner.steps=3", "learner.overlap=false")
    published: list[tuple[int, int]] = []
    publish = world.store.publish

    def slowly(*given: Any) -> Any:
        threading.Event().wait(0.3)  # as a large model takes; longer than a step
        return publish(*given)

    world.store.publish = slowly
    world.trainer.before_batch = lambda step: published.append((step, world.store.latest("policy").version))
    assert await world.learner.run(lambda: False)
    assert published == [(0, 0), (1, 1), (2, 2)]


async def test_a_step_that_fails_leaves_nothing_running(make_world: Callable[..., Any]) -> None:
    """The next batch is being gathered when it does."""
    world = await make_world(1, "learner.steps=2")

    def fail(_: int) -> None:
        raise RuntimeError("out of memory")

    world.trainer.before_batch = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        await world.learner.run(lambda: False)
    assert {task.get_name() for task in asyncio.all_tasks() - world.tasks_before} == set()
