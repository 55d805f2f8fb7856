"""The scorer's process: models, gRPC server and worker, from start to stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import grpc

from jackpot.bus import TrajectoryBus
from jackpot.compute.ranks.group import leave_ranks
from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment
from jackpot.errors import BusError, ConfigError, DeadlineError, JackpotError
from jackpot.process.service_process import announce_ready
from jackpot.rpc.server import create_server
from jackpot.scorer.engine import ScoringEngine
from jackpot.scorer.ranked_scorer import ALONE, RankedScorer, join_ranked_scorer
from jackpot.scorer.servicer import SERVICE_NAME, ScoringServicer
from jackpot.scorer.worker import ScorerWorker
from jackpot.storage.job_storage import open_weight_store, payload_place
from jackpot.storage.objects import observe_calls
from jackpot.storage.run_directory import scratch_directory
from jackpot.storage.weights import WeightStore
from jackpot.telemetry import Metrics
from jackpot.telemetry.activity import Activity
from jackpot.v1 import scoring_pb2_grpc

CONNECT_PAUSE_SECONDS = 0.5
RPC_GRACE_SECONDS = 2.0


async def serve(environment: ServiceEnvironment, job: JobSpec, stop: asyncio.Event) -> int:
    """Score on this process's rank until ``stop`` is set; returns the exit code.

    Raises:
        ConfigError: the job needs no scorer; else as :func:`serve_groups`.
        DeadlineError: as :func:`serve_groups`.
    """
    if not job.scorer_replicas:
        problem = "leaves the scores to the learner, so that there is nothing to do for a scorer"
        raise ConfigError("scorer.reuse_reference", True, problem, "Start none, or leave reuse_reference out.")
    ranked = await asyncio.to_thread(join_ranked_scorer, environment, job)
    code = 1
    try:
        if ranked.ranks.rank == 0:
            code = await serve_groups(environment, job, stop, ranked=ranked)
        else:
            # A signal stops rank 0, which stops this rank when it has finished.
            follower = await asyncio.to_thread(ranked.make_follower, job, weight_store(environment, job))
            code = await asyncio.to_thread(follower.run)
    except JackpotError as error:
        code = error.exit_code
        raise
    finally:
        if ranked.orders is not None:
            await asyncio.to_thread(ranked.orders.dismiss, code)
        leave_ranks()
    return code


async def serve_groups(
    environment: ServiceEnvironment,
    job: JobSpec,
    stop: asyncio.Event,
    metrics: Metrics | None = None,
    ranked: RankedScorer = ALONE,
) -> int:
    """Score groups from the bus and from callers until ``stop`` is set; returns the exit code. Runs on rank 0.

    Args:
        environment: the process's addresses and paths.
        job: the job as resolved.
        stop: set on SIGTERM.
        metrics: the metrics registry; None is the process's.
        ranked: this process among the ranks of the scorer.

    Raises:
        ConfigError: an address or a model cannot work.
        DeadlineError: no policy version, or no bus, within ``run.startup_timeout_seconds``.
    """
    _require_addresses(environment)
    metrics = metrics or Metrics(environment.job_id)
    observe_calls(metrics.observe_object_call)
    engine = await asyncio.to_thread(make_engine, environment, job, metrics, ranked)
    server = create_server(
        environment.listen,
        lambda grpc_server: _register(engine, grpc_server),
        [SERVICE_NAME],
        metrics=metrics,
        tls_dir=environment.tls_dir,
        tls_peer_name=environment.tls_peer_name,
        health_listen=environment.health_listen,
    )
    await server.start()
    bus: TrajectoryBus | None = None
    try:
        timeout = job.run.startup_timeout_seconds
        if not await _unless_stopped(engine.wait_for_version(0, timeout), stop):
            return 0
        bus = await connect_bus(environment, job, timeout)
        await server.health.set_ready(True)
        announce_ready(address=server.address, version=engine.version, processes=ranked.ranks.size)
        await _work(ScorerWorker(job, bus, engine, stop), engine)
    finally:
        await server.stop(RPC_GRACE_SECONDS)
        if bus is not None:
            await bus.close()
        engine.close()
        engine.activity.write()
    return 0


def weight_store(environment: ServiceEnvironment, job: JobSpec) -> WeightStore:
    """The job's weight store. All ranks of this scorer read its local copies, if it makes any."""
    copies = scratch_directory(environment) / f"weights-scorer-{environment.instance}"
    return open_weight_store(job, environment.job_id, environment.run_dir, copies)


def make_engine(
    environment: ServiceEnvironment, job: JobSpec, metrics: Metrics, ranked: RankedScorer = ALONE
) -> ScoringEngine:
    """Load the models. Slow.

    Raises:
        ConfigError: a model cannot be loaded or used.
    """
    store = weight_store(environment, job)
    activity = Activity(metrics, "scorer", environment.instance, environment.run_dir)
    target, scorer = ranked.make_scorer(job, store)
    poll_seconds = job.scorer.weight_poll_seconds
    return ScoringEngine(
        target, scorer, metrics, environment.instance, poll_seconds, activity, groups_apart=job.deterministic
    )


async def connect_bus(environment: ServiceEnvironment, job: JobSpec, timeout_seconds: float) -> TrajectoryBus:
    """An open bus, as soon as its server runs.

    Raises:
        DeadlineError: the server did not start in time.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            bus = await TrajectoryBus.connect(
                environment.redis_url,
                environment.job_id,
                job.bus,
                f"scorer-{environment.instance}",
                payload_place(job, environment.job_id, environment.run_dir),
            )
            await bus.open()
            return bus
        except BusError as error:
            if time.monotonic() >= deadline:
                raise DeadlineError("the bus", timeout_seconds, str(error)) from None
        await asyncio.sleep(CONNECT_PAUSE_SECONDS)


def _register(engine: ScoringEngine, grpc_server: grpc.aio.Server) -> None:
    scoring_pb2_grpc.add_ScoringServiceServicer_to_server(  # type: ignore[no-untyped-call]
        ScoringServicer(engine), grpc_server
    )


async def _work(worker: ScorerWorker, engine: ScoringEngine) -> None:
    """Run the worker and follow the weights concurrently; an error in either ends both."""
    working = asyncio.create_task(worker.run())
    following = asyncio.create_task(engine.follow())
    try:
        done, _ = await asyncio.wait((working, following), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        working.cancel()
        following.cancel()
        await asyncio.gather(working, following, return_exceptions=True)


async def _unless_stopped(awaited: Coroutine[Any, Any, None], stop: asyncio.Event) -> bool:
    """Whether the awaited work finished before the stop. Raises its errors."""
    task, stopping = asyncio.create_task(awaited), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        task.cancel()
        stopping.cancel()
        await asyncio.gather(task, stopping, return_exceptions=True)


def _require_addresses(environment: ServiceEnvironment) -> None:
    for field in ("redis_url", "listen"):
        if not getattr(environment, field):
            raise ConfigError(
                f"JACKPOT_{field.upper()}", "", "is required by the scorer", "Start services with `jackpot run`."
            )
