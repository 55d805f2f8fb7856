"""The learner's loop: collect a batch → write its manifest → train → publish weights → checkpoint → commit.

While a batch is trained on, the next is fetched and laid out, and the last version of the weights is written.

A group is acknowledged only once a checkpoint holds its effect. After a crash the loop starts at the last
checkpoint and trains the batches whose manifests were already written once more, on the same groups.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from jackpot.bus import TrajectoryBus
from jackpot.bus.kept_trajectories import KeptTrajectories
from jackpot.config import JobSpec
from jackpot.learner.batches.collector import BatchCollector
from jackpot.learner.checkpoints.checkpoint_store import CheckpointStore, PendingCheckpoint, Progress
from jackpot.learner.publishing.background import BackgroundWork
from jackpot.learner.publishing.publisher import WeightPublisher
from jackpot.learner.reports.alarm_log import AlarmLog
from jackpot.learner.reports.step_log import StepLog
from jackpot.learner.trainer import BatchTrainer
from jackpot.scoring.batch import Batch, build_batch
from jackpot.storage.batch_manifests import Manifest, ManifestLog
from jackpot.telemetry.activity import Activity
from jackpot.trajectory import ScoredGroup

LOG = logging.getLogger(__name__)

Result = TypeVar("Result")


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
        activity: what the time goes into.
    """

    def __init__(
        self,
        job: JobSpec,
        bus: TrajectoryBus,
        trainer: BatchTrainer,
        publisher: WeightPublisher,
        checkpoints: CheckpointStore,
        manifests: ManifestLog,
        step_log: StepLog,
        alarm_log: AlarmLog,
        kept: KeptTrajectories,
        activity: Activity,
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
        self._activity = activity
        self._progress = Progress(step=0, batch=0, obrs_lambda=trainer.lambda_control.obrs_lambda)
        self._committed_batch = 0
        self._saving: asyncio.Task[None] | None = None  # the checkpoint that is being written
        self._collector = BatchCollector(job, bus)
        self._background = BackgroundWork()
        # One, always the same: a profile that begins with one step would not see the next one in another.
        self._thread = ThreadPoolExecutor(1, "training")

    async def run(self, stopped: Callable[[], bool]) -> bool:
        """Train until the last step or until ``stopped``; whether the job is finished.

        Raises:
            DeadlineError: no group arrived for ``learner.batch_timeout_seconds``.
            AlarmError: an alarm, with ``alarms.action`` = stop.
        """
        await self._in_thread(self._restore)
        async with self._bus.leases_renewed():
            await self._publish()
            await self._background.finish()
            await self._commit(self._progress.batch)
            await self._replay(stopped)
            await self._train_all(stopped)
            await self._checkpoint()
        finished = self._progress.batch == self._job.num_batches
        if finished:
            await self._in_thread(self._publisher.export, self._trainer)
            LOG.info("all %d steps trained and exported", self._progress.step)
        return finished

    async def _train_all(self, stopped: Callable[[], bool]) -> None:
        try:
            while self._progress.batch < self._job.num_batches and not stopped():
                waiting_since = time.monotonic()
                with self._activity.doing("wait_groups"):
                    collected = await self._collector.collect(self._progress.batch, stopped, self._watch)
                if collected is None:
                    break
                waited_seconds = time.monotonic() - waiting_since
                await self._train(collected.groups, collected.batch, waited_seconds, prefetch=self._job.learner.overlap)
        finally:
            await self._collector.close()
            await self._background.finish()

    async def _in_thread(self, call: Callable[..., Result], *args: object) -> Result:
        """Do something with the trainer off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)

    def _restore(self) -> None:
        path = self._checkpoints.latest()
        if path is None:
            return
        self._progress = self._trainer.restore(self._checkpoints, path)
        self._step_log.resumed(self._progress.step)
        LOG.info("resumed from %s", path)

    async def _replay(self, stopped: Callable[[], bool]) -> None:
        """Train the batches again whose manifests were written but whose effect the checkpoint does not hold."""
        while not stopped() and (manifest := self._manifests.read(self._progress.batch)) is not None:
            groups_by_id = await self._collector.with_bus(partial(self._bus.fetch_scored, manifest.group_ids))
            missing = [group_id for group_id in manifest.group_ids if group_id not in groups_by_id]
            if missing and await self._passed_over(manifest, missing):
                continue
            if missing:
                LOG.warning("batch %d cannot be trained again: %d groups are lost", manifest.batch, len(missing))
                self._manifests.discard_from(manifest.batch)
                for group_id in missing:
                    detail = "payload missing when its batch was to be trained again"
                    await self._collector.with_bus(partial(self._bus.drop, group_id, "lost", detail))
                return
            LOG.info("training batch %d again from its manifest", manifest.batch)
            groups = [groups_by_id[group_id] for group_id in manifest.group_ids]
            learner, advantage = self._job.learner, self._job.algorithm.advantage
            await self._train(groups, build_batch(groups, advantage, learner.max_sequence_tokens), waited_seconds=0.0)

    async def _passed_over(self, manifest: Manifest, missing: Sequence[str]) -> bool:
        """Go on behind a batch that is closed on the bus: the checkpoint with its effect is lost, its groups are gone,
        and nobody makes others for its slots. False if its groups did not end as trained."""
        states = await self._collector.with_bus(partial(self._bus.readings.terminal_states, missing))
        if "trained" not in states.values():
            return False
        steps = self._job.learner.updates_per_batch
        LOG.error(
            "batch %d (%d steps from step %d on) was trained into a checkpoint that is lost, and its groups are gone: "
            "training goes on without its effect",
            manifest.batch,
            steps,
            manifest.start_step + 1,
        )
        lambda_control = self._trainer.lambda_control
        self._progress = Progress(
            manifest.start_step + steps, manifest.batch + 1, lambda_control.obrs_lambda, lambda_control.state()
        )
        return True

    async def _train(
        self, groups: list[ScoredGroup], batch: Batch, waited_seconds: float, *, prefetch: bool = False
    ) -> None:
        progress = self._progress
        self._manifests.write(Manifest(progress.batch, progress.step, tuple(group.group_id for group in groups)))
        if prefetch and progress.batch + 1 < self._job.num_batches:
            self._collector.prefetch(progress.batch + 1)
        started = time.monotonic()
        with self._activity.doing("train"):
            rows = await self._in_thread(self._trainer.train_batch, batch, progress.step)
        trained = time.monotonic()
        lambda_control = self._trainer.lambda_control
        self._progress = Progress(
            progress.step + len(rows), progress.batch + 1, lambda_control.obrs_lambda, lambda_control.state()
        )
        await self._publish(partial(self._kept.write, progress.batch, groups, self._job.run.keep_trajectories))
        published = time.monotonic()
        self._watch()
        if self._checkpoint_is_due(progress.step):
            await self._begin_checkpoint()
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

    async def _publish(self, afterwards: Callable[[], None] | None = None) -> None:
        """Publish the weights as they are, and do what comes ``afterwards``: both beside the next step.

        The copy that is written is made here; at most one is being written at a time.
        """
        with self._activity.doing("wait_publication"):
            await self._background.finish()
        with self._activity.doing("snapshot"):
            snapshot = await self._in_thread(self._publisher.snapshot, self._trainer, self._progress.step)

        def work() -> None:
            with self._activity.doing("publish"):
                self._publisher.publish(snapshot)
                if afterwards is not None:
                    afterwards()

        await self._background.start(work)
        if not self._job.learner.overlap:
            await self._background.finish()

    async def _checkpoint(self) -> None:
        """A checkpoint of what is trained so far, on disk and committed."""
        await self._begin_checkpoint()
        await self._checkpoint_written()

    async def _begin_checkpoint(self) -> None:
        """Copy what is trained so far; it is written while training goes on, and its groups are committed then."""
        await self._checkpoint_written()
        if self._progress.batch > self._committed_batch:
            with self._activity.doing("snapshot"):
                pending = await self._in_thread(self._trainer.begin_checkpoint, self._checkpoints, self._progress)
            self._saving = asyncio.create_task(self._commit_when_written(pending, self._progress.batch))

    def _watch(self) -> None:
        """What failed beside the training ends the job now, not when its result is needed."""
        self._background.check()
        if self._saving is not None and self._saving.done():
            self._saving.result()

    async def _checkpoint_written(self) -> None:
        if self._saving is not None:
            saving, self._saving = self._saving, None
            await saving

    async def _commit_when_written(self, pending: PendingCheckpoint, batch: int) -> None:
        with self._activity.doing("checkpoint"):
            await asyncio.to_thread(pending.finish)
            await self._commit(batch)

    async def _commit(self, batch: int) -> None:
        """Close the ledger on every group of the batches before ``batch``, whose effect the last checkpoint holds; safe
        to repeat."""
        size = self._job.learner.updates_per_batch
        for manifest in self._manifests.between(self._committed_batch, batch):
            steps = dict.fromkeys(manifest.group_ids, manifest.start_step + size)
            await self._collector.with_bus(partial(self._bus.commit_trained, steps))
        self._committed_batch = batch
