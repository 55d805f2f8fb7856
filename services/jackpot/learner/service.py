"""The learner's process: its ranks, its bus, and its loop on rank 0, from start to stop."""

from __future__ import annotations

import asyncio
from functools import partial

from jackpot.bus import TrajectoryBus
from jackpot.bus.kept_trajectories import KeptTrajectories
from jackpot.compute.ranks.group import Ranks, leave_ranks
from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment
from jackpot.errors import JackpotError
from jackpot.learner.checkpoints.checkpoint_store import CheckpointStore
from jackpot.learner.loop import Learner
from jackpot.learner.models.start import build_trainer
from jackpot.learner.publishing.broadcast import connect_broadcaster
from jackpot.learner.publishing.publisher import WeightPublisher
from jackpot.learner.ranks.rank_groups import RankGroups
from jackpot.learner.ranks.rank_leader import LeadTrainer, follow
from jackpot.learner.reports.alarm_log import AlarmLog
from jackpot.learner.reports.step_log import StepLog
from jackpot.learner.trainer import BatchTrainer
from jackpot.process.service_process import STOPPED_EARLY, announce_ready
from jackpot.scoring.batch import Batch
from jackpot.scoring.token_weights import TokenWeights
from jackpot.storage.batch_manifests import ManifestLog
from jackpot.storage.job_storage import open_weight_store, payload_place, stored_checkpoints
from jackpot.storage.objects import observe_calls
from jackpot.storage.run_directory import RunFiles, scratch_directory
from jackpot.telemetry import Metrics
from jackpot.telemetry.activity import Activity


async def serve(environment: ServiceEnvironment, job: JobSpec, stop: asyncio.Event) -> int:
    """Train to the last step, on this process's rank; the exit code: 0, or 75 where it was stopped before.

    Raises:
        JackpotError: what cannot be repaired here.
    """
    trainer, ranks = await asyncio.to_thread(build_trainer, environment, job)
    leader = LeadTrainer(trainer, ranks) if ranks.size > 1 and ranks.rank == 0 else None
    checkpoints = _checkpoint_store(environment, job, ranks)
    code = 1
    try:
        if ranks.rank > 0:
            # A signal stops rank 0, which stops this one when it is done.
            groups = RankGroups(environment, job, asyncio.get_running_loop())
            code = await asyncio.to_thread(follow, trainer, checkpoints, ranks, groups.read)
            await groups.close()
        else:
            metrics = Metrics(environment.job_id)
            trainer.show_tokens = partial(_observe_tokens, metrics)
            code = await _lead(environment, job, leader or trainer, checkpoints, metrics, stop)
    except JackpotError as error:
        code = error.exit_code
        raise
    finally:
        if leader is not None:
            await asyncio.to_thread(leader.dismiss, code)
        leave_ranks()
    return code


def _checkpoint_store(environment: ServiceEnvironment, job: JobSpec, ranks: Ranks) -> CheckpointStore:
    files = RunFiles(environment.run_dir)
    stored = stored_checkpoints(job, environment.job_id)
    return CheckpointStore(
        files.checkpoints if stored is None else scratch_directory(environment) / files.checkpoints.name,
        job.learner.keep_checkpoints,
        ranks=ranks,
        evaluations=files.evaluations if job.learner.keep_best_checkpoint else None,
        stored=stored,
    )


async def _lead(
    environment: ServiceEnvironment,
    job: JobSpec,
    trainer: BatchTrainer,
    checkpoints: CheckpointStore,
    metrics: Metrics,
    stop: asyncio.Event,
) -> int:
    """Rank 0, or the only process: read the bus, train, publish."""
    observe_calls(metrics.observe_object_call)
    metrics.observe_plan(job.learner.steps, job.orchestrator.max_staleness + job.learner.updates_per_batch - 1)
    activity = Activity(metrics, "learner", environment.instance, environment.run_dir)
    broadcaster = connect_broadcaster(environment, job, trainer.models.device, metrics.count_weights_broadcast)
    bus = await TrajectoryBus.connect(
        environment.redis_url,
        environment.job_id,
        job.bus,
        f"learner-{environment.instance}",
        payload_place(job, environment.job_id, environment.run_dir),
    )
    try:
        await bus.open()
        publisher = WeightPublisher(
            job,
            open_weight_store(
                job, environment.job_id, environment.run_dir, scratch_directory(environment) / "weights-learner"
            ),
            environment.run_dir,
            lambda: checkpoints.steps,
            broadcaster.send if broadcaster else None,
        )
        learner = Learner(
            job,
            bus,
            trainer,
            publisher,
            checkpoints,
            ManifestLog(RunFiles(environment.run_dir).manifests),
            StepLog(environment.run_dir, metrics),
            AlarmLog(job.alarms, environment.run_dir, metrics, exact=job.samples_in_float32),
            KeptTrajectories(environment.run_dir, job.bus.max_payload_bytes),
            activity,
        )
        announce_ready(device=str(trainer.models.device), processes=job.learner.processes)
        finished = await learner.run(stop.is_set)
        activity.write()
    finally:
        if broadcaster is not None:
            await broadcaster.close()
        await bus.close()
    return 0 if finished else STOPPED_EARLY


def _observe_tokens(metrics: Metrics, batch: Batch, weights: TokenWeights) -> None:
    ratio = (weights.target_logprobs - batch.tokens.actor_logprobs).exp()
    metrics.observe_tokens(weights.acceptance_probs, ratio, weights.normalizer)
