"""``python -m jackpot.learner``: the learner. Settings come from the JACKPOT_* variables.

With ``learner.processes`` > 1 this process starts the ranks, by torchrun, and they come here again. Starting them by
hand is the same: ``torchrun --nproc-per-node 2 -m jackpot.learner``.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from jackpot.compute.ranks.launch import run_ranked_service
from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment
from jackpot.errors import JackpotError
from jackpot.process.service_process import STOPPED_EARLY, announce_ready

if TYPE_CHECKING:
    from jackpot.learner.checkpoints.checkpoint_store import CheckpointStore
    from jackpot.learner.trainer import Trainer
    from jackpot.scoring.batch import Batch
    from jackpot.scoring.token_weights import TokenWeights
    from jackpot.telemetry import Metrics


async def main(environment: ServiceEnvironment, job: JobSpec, stop: asyncio.Event) -> int:
    """Train to the last step: 0; stopped before that: 75."""
    from jackpot.compute.ranks.group import leave_ranks
    from jackpot.learner.checkpoints.checkpoint_store import CheckpointStore
    from jackpot.learner.models.start import build_trainer
    from jackpot.learner.ranks.rank_groups import RankGroups
    from jackpot.learner.ranks.rank_leader import LeadTrainer, follow
    from jackpot.storage.job_storage import stored_checkpoints
    from jackpot.storage.run_directory import RunFiles, scratch_directory

    trainer, ranks = await asyncio.to_thread(build_trainer, environment, job)
    stored = stored_checkpoints(job, environment.job_id)
    files = RunFiles(environment.run_dir)
    store = CheckpointStore(
        files.checkpoints if stored is None else scratch_directory(environment) / files.checkpoints.name,
        job.learner.keep_checkpoints,
        ranks=ranks,
        evaluations=files.evaluations if job.learner.keep_best_checkpoint else None,
        stored=stored,
    )
    code = 1
    try:
        if ranks.rank > 0:
            # A signal stops rank 0, which stops this one when it is done.
            groups = RankGroups(environment, job, asyncio.get_running_loop())
            code = await asyncio.to_thread(follow, trainer, store, ranks, groups.read)
            await groups.close()
        else:
            code = await lead(environment, job, trainer, store, stop)
    except JackpotError as error:
        code = error.exit_code
        raise
    finally:
        if isinstance(trainer, LeadTrainer):
            await asyncio.to_thread(trainer.dismiss, code)
        leave_ranks()
    return code


async def lead(
    environment: ServiceEnvironment, job: JobSpec, trainer: Trainer, store: CheckpointStore, stop: asyncio.Event
) -> int:
    """Rank 0, or the only process: read the bus, train, publish."""
    from jackpot.bus import TrajectoryBus
    from jackpot.bus.kept_trajectories import KeptTrajectories
    from jackpot.learner.publishing.broadcast import connect_broadcaster
    from jackpot.learner.publishing.publisher import WeightPublisher
    from jackpot.learner.reports.alarm_log import AlarmLog
    from jackpot.learner.reports.step_log import StepLog
    from jackpot.learner.service import Learner
    from jackpot.storage.batch_manifests import ManifestLog
    from jackpot.storage.job_storage import open_weight_store, payload_place
    from jackpot.storage.objects import observe_calls
    from jackpot.storage.run_directory import RunFiles, scratch_directory
    from jackpot.telemetry import Metrics
    from jackpot.telemetry.activity import Activity

    run_dir, metrics = environment.run_dir, Metrics(environment.job_id)
    observe_calls(metrics.observe_object_call)
    broadcaster = connect_broadcaster(environment, job, trainer.device, metrics.count_weights_broadcast)
    bus = await TrajectoryBus.connect(
        environment.redis_url,
        environment.job_id,
        job.bus,
        f"learner-{environment.instance}",
        payload_place(job, environment.job_id, run_dir),
    )
    try:
        await bus.open()
        activity = Activity(metrics, "learner", environment.instance, run_dir)
        weights = open_weight_store(
            job, environment.job_id, run_dir, scratch_directory(environment) / "weights-learner"
        )
        learner = Learner(
            job,
            bus,
            trainer,
            WeightPublisher(job, weights, run_dir, lambda: store.steps, broadcaster.send if broadcaster else None),
            store,
            ManifestLog(RunFiles(run_dir).manifests),
            StepLog(run_dir, metrics),
            AlarmLog(job.alarms, run_dir, metrics),
            KeptTrajectories(run_dir, job.bus.max_payload_bytes),
            activity,
        )
        updates = job.learner.updates_per_batch
        metrics.observe_plan(job.learner.steps, job.orchestrator.max_staleness + updates - 1)
        trainer.show_tokens = partial(_observe_tokens, metrics)
        announce_ready(device=str(trainer.device), processes=job.learner.processes)
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


if __name__ == "__main__":
    run_ranked_service("learner", main, lambda job: job.learner.processes)
