"""The life of a service process: settings, logs, signals, metrics, exit code.

Settings are read before heavy imports, so that a mistake shows at once. Exit codes: 0 done, 75 stopped before it was
done, 2 settings that cannot work (never restarted); any other may be restarted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import NoReturn

from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment
from jackpot.errors import ConfigError, JackpotError
from jackpot.process.children import stop_with_parent
from jackpot.storage.run_directory import load_service_job
from jackpot.telemetry import REGISTRY, GpuCollector, reachable_host, serve_metrics
from jackpot.telemetry.logs import redact_url, setup_logging
from jackpot.telemetry.scrape_targets import announce_target

LOG = logging.getLogger(__name__)

ServiceMain = Callable[[ServiceEnvironment, JobSpec, asyncio.Event], Awaitable[int]]

# How long an orphaned service may take to stop cleanly before it is killed.
ORPHAN_GRACE_SECONDS = 30

# Exit code of a service stopped before its work was done: nothing is wrong, restart it (EX_TEMPFAIL).
STOPPED_EARLY = 75

# Services that export GPU metrics; the orchestrator on the same machine would export them twice.
USES_GPU = ("rollout", "scorer", "learner")
EVALUATOR = "evaluator"


def run_service(name: str, main: ServiceMain, environ: Mapping[str, str] | None = None) -> NoReturn:
    """Run one service from start to exit.

    ``main`` receives the settings, the job, and an event that is set on SIGTERM and SIGINT; it then finishes its
    current unit of work and returns the exit code. It imports heavy modules itself, once the settings are checked.
    Never returns: ends the process.

    Args:
        name: the service, for logs: ``rollout``, ``scorer``, …
        main: the service itself.
        environ: the JACKPOT_* variables; None is ``os.environ``.
    """
    parent = os.getppid()
    stop_with_parent()
    try:
        environment = ServiceEnvironment.from_env(environ)
        job = load_service_job(environment)
        setup_logging(name, environment.instance)
        if environment.metrics_address:
            _serve_metrics(name, environment)
    except ConfigError as error:
        _complain(error)
        sys.exit(error.exit_code)
    LOG.info("starting", extra={"pid": os.getpid(), "job_id": environment.job_id})
    try:
        code = asyncio.run(_until_stopped(main, environment, job, parent))
    except JackpotError as error:
        _complain(error)
        code = error.exit_code
    except Exception:
        LOG.critical("stopped by an unexpected error", exc_info=True)
        code = 1
    LOG.info("finished", extra={"exit_code": code})
    logging.shutdown()
    sys.stdout.flush()
    # Everything is closed and flushed. Tearing down torch and gRPC would take another second, while a user waits for
    # Ctrl-C to finish.
    os._exit(code)


def _serve_metrics(name: str, environment: ServiceEnvironment) -> None:
    if name in USES_GPU:
        GpuCollector(environment.job_id, REGISTRY)
    port = serve_metrics(environment.metrics_address)
    address = f"{reachable_host(environment.metrics_address, environment.metrics_host)}:{port}"
    # The evaluator is a rollout service with its own purpose, and so a separate service in Prometheus.
    evaluates = environment.instance == EVALUATOR
    service, instance = (EVALUATOR, EVALUATOR) if evaluates else (name, f"{name}-{environment.instance}")
    try:
        announce_target(environment.run_dir, environment.job_id, service, instance, address)
    except OSError as error:
        LOG.warning("the address of /metrics cannot be recorded, so Prometheus will not find it: %s", error)


def announce_ready(**details: object) -> None:
    """Log that this process is ready."""
    LOG.info("ready", extra=details)


async def _until_stopped(main: ServiceMain, environment: ServiceEnvironment, job: JobSpec, parent: int) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if not stop.is_set():
            LOG.info("stopping on %s", number.name)
        if os.getppid() != parent:
            # An orphan has no supervisor to kill it if it hangs: the alarm ends the process even if the loop is stuck.
            signal.alarm(ORPHAN_GRACE_SECONDS)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return await main(environment, job, stop)


def _complain(error: JackpotError) -> None:
    print(f"error: {redact_url(str(error))}", file=sys.stderr, flush=True)
