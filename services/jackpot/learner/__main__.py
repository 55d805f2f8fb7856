"""``python -m jackpot.learner``: the learner process. Settings come from the JACKPOT_* variables."""

from __future__ import annotations

import asyncio

from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment
from jackpot.runtime.process import STOPPED_EARLY, announce_ready, run_service


async def main(environment: ServiceEnvironment, job: JobSpec, stop: asyncio.Event) -> int:
    """Train to the last step: 0; stopped before that: 75."""
    from jackpot.learner.alarm_log import AlarmLog
    from jackpot.learner.checkpoint import CheckpointStore
    from jackpot.learner.manifests import ManifestLog
    from jackpot.learner.publisher import WeightPublisher
    from jackpot.learner.service import Learner
    from jackpot.learner.step_log import StepLog
    from jackpot.learner.trainer import Trainer
    from jackpot.runtime.activity import Activity
    from jackpot.runtime.bus import TrajectoryBus
    from jackpot.runtime.kept_trajectories import KeptTrajectories
    from jackpot.runtime.metrics import Metrics
    from jackpot.runtime.models import load_causal_lm, resolve_device, set_threads
    from jackpot.runtime.weights import WeightStore

    set_threads(environment.threads)
    device = resolve_device(job.learner.device, field="learner.device")
    policy = load_causal_lm(job.policy.model, job.policy.dtype, device, field="policy.model")
    actor = None
    if not isinstance(job.actor, str) and job.actor.weights == "own":
        actor = load_causal_lm(job.actor.model, job.actor.dtype, device, field="actor.model")
    run_dir, metrics = environment.run_dir, Metrics(environment.job_id)
    bus = await TrajectoryBus.connect(
        environment.redis_url, environment.job_id, job.bus, f"learner-{environment.instance}", run_dir / "payloads"
    )
    try:
        await bus.open()
        activity = Activity(metrics, "learner", environment.instance, run_dir)
        learner = Learner(
            job,
            bus,
            Trainer(job, policy, actor),
            WeightPublisher(job, WeightStore(run_dir / "weights"), run_dir),
            CheckpointStore(run_dir / "checkpoints", job.learner.keep_checkpoints),
            ManifestLog(run_dir / "manifests"),
            StepLog(run_dir, metrics),
            AlarmLog(job.alarms, run_dir, metrics),
            KeptTrajectories(run_dir, job.bus.max_payload_bytes),
            activity,
        )
        announce_ready(device=str(device))
        finished = await learner.run(stop.is_set)
        activity.write()
    finally:
        await bus.close()
    return 0 if finished else STOPPED_EARLY


if __name__ == "__main__":
    run_service("learner", main)
