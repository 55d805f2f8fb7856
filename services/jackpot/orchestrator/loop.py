"""The orchestrator's loop: recovers, dispatches and evaluates until the last step, then closes the ledger."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from pathlib import Path

from jackpot.bus import TrajectoryBus
from jackpot.config import JobSpec
from jackpot.errors import BusError, BusLostError, DeadlineError
from jackpot.orchestrator.dispatch import Dispatcher, TrainingPrompts
from jackpot.orchestrator.evaluation import EvaluationLog, PolicyEvaluation
from jackpot.orchestrator.failures import first_error
from jackpot.orchestrator.gauges import JobGauges
from jackpot.orchestrator.ledger import LedgerFile
from jackpot.orchestrator.ledger_sync import LedgerSync
from jackpot.orchestrator.membership import RolloutMembership
from jackpot.orchestrator.prompts import PromptEncoder, held_out
from jackpot.orchestrator.replicas import ReplicaPool
from jackpot.orchestrator.rewards import RewardPool
from jackpot.orchestrator.slots import SlotBook
from jackpot.orchestrator.tasks import build_task
from jackpot.orchestrator.tokenizer import PromptTokenizer
from jackpot.orchestrator.versions import VersionWatch
from jackpot.process.service_process import announce_ready
from jackpot.storage.batch_manifests import ManifestLog
from jackpot.storage.job_storage import open_weight_store
from jackpot.storage.run_directory import RunFiles
from jackpot.storage.run_records import TerminalRecord
from jackpot.telemetry import Metrics
from jackpot.telemetry.activity import Activity
from jackpot.trajectory import GroupKey

LOG = logging.getLogger(__name__)

TRAINED_POLL_SECONDS = 0.05
OUTAGE_POLL_SECONDS = 0.5
OUTAGE_SECONDS = 120.0  # if the bus is unreachable for longer, the process ends


class Orchestrator:
    """One job's orchestrator, on an open bus and open channels.

    Args:
        job: the job, its models resolved to directories.
        job_id: its id.
        run_dir: its run directory.
        bus: the connected bus.
        replicas: the rollout replicas.
        membership: keeps the replicas up to date.
        evaluator: the rollout server with the policy's weights.
        rewards: computes the rewards.
        metrics: shows figures.
    """

    def __init__(
        self,
        *,
        job: JobSpec,
        job_id: str,
        run_dir: Path,
        bus: TrajectoryBus,
        replicas: ReplicaPool,
        membership: RolloutMembership,
        evaluator: ReplicaPool,
        rewards: RewardPool,
        metrics: Metrics,
    ) -> None:
        task = build_task(job.task, job.seed)
        tokenizer = PromptTokenizer.of_job(job)
        encoder = PromptEncoder.of_job(job, tokenizer)
        self._job = job
        self._job_id = job_id
        files = RunFiles(run_dir)
        self._manifests = ManifestLog(files.manifests)
        self._bus = bus
        self._replicas = replicas
        self._membership = membership
        self._evaluator = evaluator
        self._bus_lost = False
        self._activity = Activity(metrics, "orchestrator", "0", run_dir)
        self._ledger = LedgerFile(files.ledger)
        self._book = SlotBook.of_job(job, task.num_prompts)
        store = open_weight_store(job, job_id, run_dir, files.scratch / "weights-orchestrator")  # never reads weights
        self._versions = VersionWatch(store, {"policy", job.rollout_role})
        self._prompts = TrainingPrompts(task, encoder)
        self._dispatcher = Dispatcher(
            job=job,
            job_id=job_id,
            bus=bus,
            book=self._book,
            versions=self._versions,
            replicas=replicas,
            prompts=self._prompts,
            tokenizer=tokenizer,
            rewards=rewards,
            metrics=metrics,
            activity=self._activity,
        )
        self._ledger_sync = LedgerSync(bus.readings, self._ledger, self._book, metrics, self._dispatcher.slots_changed)
        self._gauges = JobGauges(bus.readings, self._versions, replicas, run_dir, metrics)
        self._evaluation = PolicyEvaluation(
            job=job,
            job_id=job_id,
            questions=held_out(task.eval_items(job.evaluation.prompts), encoder),
            tokenizer=tokenizer,
            evaluator=evaluator,
            versions=self._versions,
            rewards=rewards,
            log=EvaluationLog(files.evaluations),
            metrics=metrics,
        )

    async def run(self) -> None:
        """Orchestrate until the last step is trained, committed and evaluated.

        Raises:
            JackpotError: a failure that the orchestrator cannot repair.
        """
        while not await self._run_until_bus_fails():
            await asyncio.sleep(OUTAGE_POLL_SECONDS)
        await self._close_ledger()
        LOG.info("done", extra={"trained": self._book.num_trained})

    def close(self) -> None:
        """End the thread that prepares prompts."""
        self._prompts.close()
        self._activity.write()

    async def _run_until_bus_fails(self) -> bool:
        """Orchestrate from the state in bus and ledger; whether the job is done. False: the bus failed, start again."""
        try:
            if self._bus_lost:
                await self._declare_lost()
            # In a separate task, for the same reason as an evaluation: each start needs a fresh task.
            again = await self._recover()
            await asyncio.create_task(self._orchestrate(again))
            return True
        except BusLostError as error:
            LOG.error("incident: the bus lost the job's state (%s)", error)
            self._bus_lost = True
        except BusError as error:
            if time.monotonic() - self._ledger_sync.succeeded_at > OUTAGE_SECONDS:
                raise
            LOG.warning("the bus is not available: %s", error)
        return False

    async def _orchestrate(self, again: Iterable[GroupKey]) -> None:
        startup = self._job.run.startup_timeout_seconds
        try:
            async with asyncio.TaskGroup() as tasks:
                background = [
                    tasks.create_task(coroutine)
                    for coroutine in (
                        self._versions.watch(),
                        self._membership.follow(),
                        self._replicas.watch(),
                        self._evaluator.watch(),
                        self._ledger_sync.run(),
                        self._gauges.run(),
                        self._dispatcher.run(again),
                    )
                ]
                announce_ready()
                await self._versions.wait(self._job.rollout_role, 0, startup)
                await self._evaluation.run(self._dispatcher.evaluated)
                await self._wait_until_all_trained()
                for task in background:
                    task.cancel()
        except BaseExceptionGroup as errors:
            lost, _ = errors.split(BusLostError)
            raise first_error(errors if lost is None else lost) from None

    async def _recover(self) -> list[GroupKey]:
        """Rebuild the book; returns the groups that were dispatched but never published, in slot order."""
        await self._bus.open()
        states = {
            GroupKey.parse(group_id): state for group_id, state in (await self._bus.readings.dispatched()).items()
        }
        self._ledger_sync.rewind()
        # Read after the above, so that a group that ends in between counts as ended.
        await self._ledger_sync.catch_up()
        ended = self._ledger.ended
        opened = {key for key in (*states, *self._claimed_by_learner()) if key not in ended}
        self._book.restore(ended, opened)
        if ended or opened:
            LOG.info("recovered", extra={"ended": len(ended), "open": len(opened)})
        return sorted((key for key in opened if states.get(key) == "dispatched"), key=lambda key: key.slot)

    def _claimed_by_learner(self) -> set[GroupKey]:
        """The groups of the learner's write-ahead manifests: trained, or to be trained again from them."""
        return {GroupKey.parse(group_id) for manifest in self._manifests.all() for group_id in manifest.group_ids}

    async def _declare_lost(self) -> None:
        """End every group that was lost with the bus in the ledger; recovery then dispatches them again."""
        await self._bus.open()
        kept = {
            GroupKey.parse(group_id) for group_id in await self._bus.readings.dispatched()
        } | self._claimed_by_learner()
        lost = [key.group_id(self._job_id) for key in self._book.open_groups if key not in kept]
        detail = "the bus lost the job's state"
        self._ledger.append(TerminalRecord(group_id, "dropped", "lost", -1, detail) for group_id in lost)
        self._bus_lost = False
        LOG.warning("%d groups are lost and will be generated again", len(lost))

    async def _wait_until_all_trained(self) -> None:
        timeout = self._job.learner.batch_timeout_seconds
        deadline = time.monotonic() + timeout
        while self._book.num_trained < self._job.num_groups:
            if time.monotonic() > deadline:
                missing = self._job.num_groups - self._book.num_trained
                raise DeadlineError(f"the learner to commit {missing} groups", timeout, "Look at the learner's log.")
            await asyncio.sleep(TRAINED_POLL_SECONDS)

    async def _close_ledger(self) -> None:
        await self._bus.close_job()
        await self._ledger_sync.catch_up()
