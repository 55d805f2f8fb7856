"""Before any process starts: make the built-in models, and check that the job can work. No torch."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from typing import Any

from redis.asyncio.connection import parse_url

from jackpot.config import JobSpec
from jackpot.control_plane.observing.trackers import require_trackers
from jackpot.control_plane.sessions.model_directories import check_models
from jackpot.demo.recipe import builtin_models_missing, is_builtin, make_command, resolve_builtin
from jackpot.errors import ConfigError, JackpotError, ObjectStoreError
from jackpot.orchestrator.preflight import validate_job
from jackpot.process.children import ending_with_us
from jackpot.process.processor import has_cpu_build, refuse_8_bit_cache
from jackpot.storage.objects import Objects
from jackpot.telemetry.logs import redact_url

TIDY_UP_SECONDS = 5.0


def prepare_job(job: JobSpec) -> JobSpec:
    """Make what is missing, check everything, and return the job with its models as directories.

    Raises:
        ConfigError: naming field, value and remedy.
        JackpotError: the built-in models could not be made.
    """
    resolved = prepare_models(job)
    validate_job(resolved)
    return resolved


def prepare_models(job: JobSpec) -> JobSpec:
    """As :func:`prepare_job`, but the task is left to :func:`validate_job`.

    Raises:
        ConfigError: naming field, value and remedy.
        JackpotError: the built-in models could not be made.
    """
    require_trackers(job)
    if job.rollout.engine == "vllm" and has_cpu_build():
        refuse_8_bit_cache(job)
    check_bus_url(job)  # first, because it is quick: models take half a minute to make
    check_weight_store(job)
    make_builtin_models(job)
    resolved = resolve_models(job)
    check_models(resolved)
    return resolved


def check_bus_url(job: JobSpec) -> None:
    """Check that the bus's address, if there is one, is a valid Redis URL.

    Raises:
        ConfigError: it is not; the message does not repeat a password in it.
    """
    url = job.bus.url
    if url is None:
        return
    remedy = (
        "Write redis://host:port, rediss://host:port (TLS) or unix:///path, or leave it out for an embedded server."
    )
    try:
        parts = parse_url(url)
    except ValueError as error:
        problem = " ".join(str(error).split()).rstrip(".")
        raise ConfigError("bus.url", redact_url(url), f"is not the address of a Redis ({problem})", remedy) from None
    if not parts.get("path") and not parts.get("host"):
        raise ConfigError("bus.url", redact_url(url), "names no server", remedy)


def check_weight_store(job: JobSpec) -> None:
    """Check that the object store, if there is one, can be written to, read, listed and deleted from.

    Raises:
        ConfigError: it cannot.
    """
    if job.weights.store is None:
        return
    try:
        Objects(job.weights.store).check()
    except ObjectStoreError as error:
        problem, _, remedy = str(error).rpartition(". ")
        raise ConfigError("weights.store", job.weights.store, problem, remedy.rstrip(".") + ".") from None


def make_builtin_models(job: JobSpec) -> None:
    """Warm up built-in models that the job names and the cache lacks; progress goes to the terminal.

    Raises:
        JackpotError: the warm-up failed.
    """
    for recipe in builtin_models_missing(job):
        if _run_to_end(make_command(recipe)):
            raise JackpotError(f"the built-in models of {recipe!r} could not be made; see the lines above")


def _run_to_end(command: Sequence[str]) -> int:
    """Run a command; its exit code. An interrupt is passed on to it, and it gets time to clean up."""
    process = subprocess.Popen(
        ending_with_us(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # stdout belongs to the caller (--json); the warm-up's progress is on stderr
        start_new_session=True,  # a Ctrl-C reaches it through us only: once, not twice
    )
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(TIDY_UP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def resolve_models(job: JobSpec) -> JobSpec:
    """The same job with ``builtin:`` names replaced by their directories."""

    def resolve(model: str) -> str:
        return str(resolve_builtin(model)) if is_builtin(model) else model

    update: dict[str, Any] = {"policy": job.policy.model_copy(update={"model": resolve(job.policy.model)})}
    if not isinstance(job.actor, str):
        update["actor"] = job.actor.model_copy(update={"model": resolve(job.actor.model)})
    return job.model_copy(update=update)
