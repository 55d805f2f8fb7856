"""The orchestrator's process: its bus, its channels and its loop, from start to stop."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from functools import partial

from jackpot.bus import TrajectoryBus
from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment
from jackpot.orchestrator.loop import Orchestrator
from jackpot.orchestrator.membership import RolloutMembership
from jackpot.orchestrator.replicas import ReplicaPool
from jackpot.orchestrator.rewards import RewardPool
from jackpot.process.service_process import STOPPED_EARLY
from jackpot.rpc.channel import open_channel
from jackpot.storage.job_storage import payload_place
from jackpot.storage.objects import observe_calls
from jackpot.storage.run_directory import RunFiles
from jackpot.telemetry import Metrics


async def serve(environment: ServiceEnvironment, job: JobSpec, stop: asyncio.Event) -> int:
    """Run the job's orchestrator to its end or until ``stop`` is set; returns the exit code.

    Raises:
        JackpotError: a failure that the orchestrator cannot repair.
    """
    work = asyncio.create_task(_orchestrate(environment, job))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not work.done():
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work
        return STOPPED_EARLY
    await work
    return 0


async def _orchestrate(environment: ServiceEnvironment, job: JobSpec) -> None:
    metrics = Metrics(environment.job_id)
    observe_calls(metrics.observe_object_call)
    async with AsyncExitStack() as stack:
        bus = await TrajectoryBus.connect(
            environment.redis_url,
            environment.job_id,
            job.bus,
            consumer=f"orchestrator-{environment.instance}",
            payloads=payload_place(job, environment.job_id, environment.run_dir),
        )
        stack.push_async_callback(bus.close)
        connect = partial(open_channel, tls_dir=environment.tls_dir, tls_peer_name=environment.tls_peer_name)
        attempts = job.orchestrator.attempts
        fixed = environment.rollout_addresses
        replicas = ReplicaPool(connect, fixed, attempts, job.orchestrator.generate_timeout_seconds)
        evaluator = ReplicaPool(connect, [environment.evaluator_address], attempts, job.evaluation.timeout_seconds)
        for pool in (replicas, evaluator):
            stack.push_async_callback(pool.close)
        failures = RunFiles(environment.run_dir).reward_failures
        rewards = RewardPool(job.task, job.seed, metrics=metrics, failures=failures)
        stack.push_async_callback(rewards.close)
        orchestrator = Orchestrator(
            job=job,
            job_id=environment.job_id,
            run_dir=environment.run_dir,
            bus=bus,
            replicas=replicas,
            membership=RolloutMembership(replicas, environment.run_dir, fixed),
            evaluator=evaluator,
            rewards=rewards,
            metrics=metrics,
        )
        stack.callback(orchestrator.close)
        await orchestrator.run()
