"""The learner's loop: collect a batch → write its manifest → train → publish weights → checkpoint → commit.

A group is acknowledged only once a checkpoint holds its effect. After a crash the loop starts at the last
checkpoint and trains the batches whose manifests were already written once more, on the same groups.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TypeVar

from jackpot.config import JobSpec
from jackpot.errors import BusError, BusLostError, DeadlineError
from jackpot.learner.alarm_log import AlarmLog
from jackpot.learner.batch import build_batch
from jackpot.learner.checkpoint import CheckpointStore, Progress
from jackpot.learner.manifests import Manifest, ManifestLog
from jackpot.learner.publisher import WeightPublisher
from jackpot.learner.step_log import StepLog
from jackpot.learner.trainer import Trainer
from jackpot.runtime.bus import Delivery, TrajectoryBus
from jackpot.runtime.kept_trajectories import KeptTrajectories
from jackpot.trajectory import GroupKey, ScoredGroup

LOG = logging.getLogger(__name__)

Result = TypeVar("Result")

# Short enough that a stop request or a lease renewal is never late, long enough not to spin.
BLOCK_SECONDS = 1.0


class Learner:
    """Trains one job to its last step.

    Args:
        job: the job as resolved.
        bus: an open bus.
        trainer: models and optimizers.
        publisher: where weight versions go.
        checkpoints: where checkpoints go.
        manifests: the write-ahead log of batches.
        step_log: where each step's figures go.
        alarm_log: who watches them.
        kept: where the last batches stay to be looked at.
    """

    def __init__(
        self,
        job: JobSpec,
        bus: TrajectoryBus,
        trainer: Trainer,
        publisher: WeightPublisher,
        checkpoints: CheckpointStore,
        manifests: ManifestLog,
        step_log: StepLog,
        alarm_log: AlarmLog,
        kept: KeptTrajectories,
    ) -> None:
        self._job = job
        self._bus = bus
        self._trainer = trainer
        self._publisher = publisher
        self._checkpoints = checkpoints
        self._manifests = manifests
        self._step_log = step_log
        self._alarm_log = alarm_log
        self._kept = kept
        self._progress = Progress(step=0, batch=0, obrs_lambda=trainer.controls.obrs_lambda)
        self._committed_batch = 0
        self._held: dict[int, Delivery[ScoredGroup]] = {}  # by slot: taken from the bus, not yet in a batch
        self._trained: list[Delivery[ScoredGroup]] = []  # in a batch, acknowledged with the next checkpoint

    async def run(self, stopped: Callable[[], bool]) -> bool:
        """Train until the last step or until ``stopped``; whether the job is finished.

        Raises:
            DeadlineError: no group arrived for ``learner.batch_timeout_seconds``.
            AlarmError: an alarm, with ``alarms.action`` = stop.
        """
        self._restore()
        async with self._leases_renewed():
            await self._publish()
            await self._commit()
            await self._replay(stopped)
            while self._progress.batch < self._job.num_batches and not stopped():
                waiting_since = time.monotonic()
                groups = await self._collect(stopped)
                if groups is None:
                    break
                await self._train(groups, waited_seconds=time.monotonic() - waiting_since)
            await self._checkpoint()
        finished = self._progress.batch == self._job.num_batches
        if finished:
            await asyncio.to_thread(self._publisher.export, self._trainer)
            LOG.info("all %d steps trained and exported", self._progress.step)
        return finished

    def _restore(self) -> None:
        path = self._checkpoints.latest()
        if path is None:
            return
        self._progress = self._checkpoints.load(path, self._trainer.learnables)
        self._trainer.controls.restore(self._progress.obrs_lambda, self._progress.controls)
        self._step_log.resumed(self._progress.step)
        LOG.info("resumed from %s", path)

    async def _replay(self, stopped: Callable[[], bool]) -> None:
        """Train the batches again whose manifests were written but whose effect no checkpoint holds."""
        while not stopped() and (manifest := self._manifests.read(self._progress.batch)) is not None:
            found = await self._with_bus(partial(self._bus.fetch_scored, manifest.group_ids))
            missing = [group_id for group_id in manifest.group_ids if group_id not in found]
            if missing:
                LOG.warning("batch %d cannot be trained again: %d groups are lost", manifest.batch, len(missing))
                self._manifests.discard_from(manifest.batch)
                for group_id in missing:
                    detail = "payload missing when its batch was to be trained again"
                    await self._with_bus(partial(self._bus.drop, group_id, "lost", detail))
                return
            LOG.info("training batch %d again from its manifest", manifest.batch)
            await self._train([found[group_id] for group_id in manifest.group_ids], waited_seconds=0.0)

    async def _collect(self, stopped: Callable[[], bool]) -> list[ScoredGroup] | None:
        """The groups of the next batch's slots, in slot order; None if stopped while waiting.

        Raises:
            DeadlineError: nothing arrived for ``batch_timeout_seconds``.
        """
        size = self._job.learner.groups_per_batch
        slots = range(self._progress.batch * size, (self._progress.batch + 1) * size)
        timeout = self._job.learner.batch_timeout_seconds
        deadline = time.monotonic() + timeout
        while any(slot not in self._held for slot in slots):
            if stopped():
                return None
            deliveries = await self._take(size)
            if deliveries:
                deadline = time.monotonic() + timeout
            elif time.monotonic() > deadline:
                have = sum(slot in self._held for slot in slots)
                raise DeadlineError(
                    f"batch {self._progress.batch} ({have} of {size} groups are here)",
                    timeout,
                    "Look at the scorer's and the orchestrator's logs, or raise learner.batch_timeout_seconds.",
                )
            for delivery in deliveries:
                await self._hold(delivery)
        batch = [self._held.pop(slot) for slot in slots]
        self._trained += batch
        return [delivery.value for delivery in batch]

    async def _take(self, count: int) -> list[Delivery[ScoredGroup]]:
        return await self._with_bus(lambda: self._bus.take_scored(count, BLOCK_SECONDS))

    async def _with_bus(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """Repeat a call, safe to repeat as all of the bus's are, until the server is back.

        Raises:
            DeadlineError: it stayed away for ``batch_timeout_seconds``.
        """
        timeout = self._job.learner.batch_timeout_seconds
        deadline = time.monotonic() + timeout
        while True:
            try:
                return await call()
            except BusLostError:
                # What was held is generated anew by the orchestrator; what was trained is in the manifests.
                self._held.clear()
                await self._bus.open()
            except BusError as error:
                if time.monotonic() > deadline:
                    raise DeadlineError("the bus", timeout, f"The last error was: {error}") from error
                LOG.warning("the bus is not available: %s", error)
                await asyncio.sleep(BLOCK_SECONDS)

    async def _hold(self, delivery: Delivery[ScoredGroup]) -> None:
        slot = GroupKey.parse(delivery.group_id).slot
        if slot < self._progress.batch * self._job.learner.groups_per_batch:
            # Delivered again after a restart; its batch has just been trained from the manifest.
            self._trained.append(delivery)
        elif slot in self._held and self._held[slot].group_id != delivery.group_id:
            detail = "its slot was already filled"
            await self._with_bus(partial(self._bus.drop, delivery.group_id, "unused", detail))
        else:
            self._held[slot] = delivery

    async def _train(self, groups: list[ScoredGroup], waited_seconds: float) -> None:
        progress = self._progress
        self._manifests.write(Manifest(progress.batch, progress.step, tuple(group.group_id for group in groups)))
        batch = build_batch(groups, self._job.algorithm.advantage)
        started = time.monotonic()
        rows = await asyncio.to_thread(self._trainer.train_batch, batch, progress.step)
        trained = time.monotonic()
        controls = self._trainer.controls
        self._progress = Progress(progress.step + len(rows), progress.batch + 1, controls.obrs_lambda, controls.state())
        await self._publish()
        published = time.monotonic()
        if self._checkpoint_is_due(progress.step):
            await self._checkpoint()
        now = time.monotonic()
        times = {
            "time/wait_batch_seconds": waited_seconds,
            "time/train_seconds": trained - started,
            "time/publish_seconds": published - trained,
            "time/checkpoint_seconds": now - published,
            "time/step_seconds": (now - started + waited_seconds) / len(rows),
            "throughput/tokens_per_second": batch.num_tokens / (now - started + waited_seconds),
        }
        self._step_log.write([row | times for row in rows], batch.num_tokens)
        await asyncio.to_thread(self._kept.write, progress.batch, groups, self._job.run.keep_trajectories)
        await self._heed_alarms(rows)

    async def _heed_alarms(self, rows: list[dict[str, float]]) -> None:
        """Look for signs of collapse; where they are to stop the job, nothing that was trained is lost.

        Raises:
            AlarmError: an alarm, and the job is to stop on it.
        """
        alarms = self._alarm_log.look(rows)
        if alarms and self._job.alarms.action == "stop":
            await self._checkpoint()
        self._alarm_log.stop_on(alarms)

    def _checkpoint_is_due(self, step_before: int) -> bool:
        every = self._job.learner.checkpoint_every
        return self._progress.step // every > step_before // every

    async def _publish(self) -> None:
        await asyncio.to_thread(self._publisher.publish, self._trainer, self._progress.step)

    async def _checkpoint(self) -> None:
        if self._progress.batch > self._committed_batch:
            await asyncio.to_thread(self._checkpoints.save, self._progress, self._trainer.learnables)
            await self._commit()

    async def _commit(self) -> None:
        """Close the ledger on every group that the last checkpoint holds; safe to repeat."""
        size = self._job.learner.updates_per_batch
        for manifest in self._manifests.between(self._committed_batch, self._progress.batch):
            steps = dict.fromkeys(manifest.group_ids, manifest.start_step + size)
            await self._with_bus(partial(self._bus.commit_trained, steps))
        self._committed_batch = self._progress.batch
        self._trained.clear()

    @asynccontextmanager
    async def _leases_renewed(self) -> AsyncIterator[None]:
        async def renew() -> None:
            while True:
                await asyncio.sleep(self._job.bus.lease_seconds / 3)
                try:
                    await self._bus.renew([*self._held.values(), *self._trained])
                except BusError as error:
                    LOG.warning("leases not renewed: %s", error)

        task = asyncio.create_task(renew())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
