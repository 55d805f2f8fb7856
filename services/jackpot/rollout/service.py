"""The rollout service's process: an engine, kept at the newest weights, behind gRPC."""

from __future__ import annotations

import asyncio
import logging

import grpc

from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment
from jackpot.errors import DeadlineError
from jackpot.process.scaling import announce_rollout, withdraw_rollout
from jackpot.process.service_process import EVALUATOR, announce_ready
from jackpot.rollout.engine import RolloutEngine
from jackpot.rollout.engine_choice import create_engine
from jackpot.rollout.servicer import SERVICE_NAME, RolloutServicer
from jackpot.rollout.weight_follower import WeightFollower
from jackpot.rpc.server import RpcServer, create_server
from jackpot.storage.job_storage import open_weight_store
from jackpot.storage.objects import observe_calls
from jackpot.storage.run_directory import scratch_directory
from jackpot.telemetry import Metrics
from jackpot.telemetry.activity import Activity
from jackpot.v1 import rollout_pb2_grpc

LOG = logging.getLogger(__name__)


async def serve(environment: ServiceEnvironment, job: JobSpec, stop: asyncio.Event) -> int:
    """Serve until ``stop``; the exit code. Ready once a version from the weight store is loaded.

    Raises:
        ConfigError: the engine, the model or the address cannot work.
        EngineError: the engine failed; the process should be restarted.
    """
    metrics = Metrics(environment.job_id)
    observe_calls(metrics.observe_object_call)
    engine = await asyncio.to_thread(create_engine, job, environment, metrics)
    activity = Activity(metrics, "rollout", environment.instance, environment.run_dir)
    copies = scratch_directory(environment) / f"weights-rollout-{environment.instance}"
    follower = WeightFollower(
        engine,
        open_weight_store(job, environment.job_id, environment.run_dir, copies),
        environment.role,
        job.rollout.weight_poll_seconds,
        # It is asked for few versions, and each is 16 GB for an 8 B policy.
        on_demand=environment.instance == EVALUATOR,
        on_loaded=lambda version, seconds: metrics.observe_weights(environment.role, version, seconds),
        on_refused=lambda version: metrics.count_weights_refused(environment.role),
    )

    def register(server: grpc.aio.Server) -> None:
        servicer = RolloutServicer(engine, follower, environment.role, activity)
        rollout_pb2_grpc.add_RolloutServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]

    server = create_server(
        environment.listen,
        register,
        [SERVICE_NAME],
        metrics=metrics,
        tls_dir=environment.tls_dir,
        tls_peer_name=environment.tls_peer_name,
        health_listen=environment.health_listen,
    )
    await server.start()
    if environment.advertise_address:
        announce_rollout(environment.run_dir, environment.instance, environment.advertise_address)
    try:
        await _until_stopped(stop, engine, follower, server, job.run.startup_timeout_seconds)
    finally:
        if environment.advertise_address:
            withdraw_rollout(environment.run_dir, environment.instance)
        await server.stop()
        await engine.close()
        activity.write()
    return 0


async def _until_stopped(
    stop: asyncio.Event, engine: RolloutEngine, follower: WeightFollower, server: RpcServer, patience_seconds: float
) -> None:
    """Return on ``stop``; raise the error that ends the engine or the follower."""
    tasks = [
        asyncio.create_task(work)
        for work in (
            stop.wait(),
            engine.wait_failed(),
            follower.follow(),
            _become_ready(stop, engine, follower, server, patience_seconds),
        )
    ]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _become_ready(
    stop: asyncio.Event, engine: RolloutEngine, follower: WeightFollower, server: RpcServer, patience_seconds: float
) -> None:
    while engine.version < 0:
        try:
            await follower.wait_for(0, patience_seconds)
        except DeadlineError as error:
            LOG.warning("not ready yet: %s", error)
    await server.health.set_ready(True)
    announce_ready(engine=engine.name, version=engine.version)
    await stop.wait()
