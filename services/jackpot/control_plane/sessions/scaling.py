"""A session's part in scaling: it passes the wanted number of replicas from the run directory to the launcher."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from jackpot.control_plane.launch.launcher import Launcher
from jackpot.errors import ConfigError, JackpotError, JobStateError
from jackpot.process.scaling import set_wanted_replicas, wanted_replicas
from jackpot.storage.json_files import JsonLinesWriter
from jackpot.storage.run_directory import RunDirectory, RunFiles
from jackpot.storage.run_records import read_summary

RETRY_SECONDS = 5.0
DRAIN_SECONDS = 2.0
"""Wait between a request for fewer replicas and their SIGTERM. The orchestrator looks every half second, and by then
sends the leaving ones no more requests."""


def request_scale(run: RunDirectory, replicas: int) -> None:
    """Request this many rollout replicas; the session that runs the job, or the next one, carries it out.

    Raises:
        ConfigError: the number is out of bounds, or the job's replicas cannot change.
        JobStateError: the job has succeeded.
    """
    if (read_summary(run.files) or {}).get("state") == "succeeded":
        raise JobStateError(f"{run.job_id} has succeeded already; only a job that runs can be scaled")
    transport = run.load_job().weights.transport
    if transport != "store":
        raise ConfigError(
            "weights.transport",
            transport,
            "broadcasts weights to the rollout replicas that the job began with, whose number cannot change",
            "Set it to store in a job that is to be scaled.",
        )
    set_wanted_replicas(run.path, replicas)


def rollout_replicas(run_dir: Path, configured: int) -> int:
    """How many rollout replicas a job should have: the number last requested, else its job file's."""
    return wanted_replicas(run_dir) or configured


class Scaling:
    """Follows the number of replicas wanted. Each change, and each first refusal of one, is recorded.

    Args:
        run_dir: the run directory.
        launcher: the job's, started.
        replicas: rollout replicas that the launcher has started.
    """

    def __init__(self, run_dir: Path, launcher: Launcher, replicas: int) -> None:
        self._run_dir = run_dir
        self._writer = JsonLinesWriter(RunFiles(run_dir).scalings)
        self._launcher = launcher
        self._replicas = replicas
        self._told: int | None = None  # a launcher that takes over a job does not know how it was scaled
        self._refused: tuple[int, str] | None = None
        self._wait_until = 0.0
        self._leaving: int | None = None  # fewer are wanted; the orchestrator gets time to see it

    async def look(self) -> None:
        """Have the launcher run the wanted number. A failed request is repeated later; the job goes on meanwhile."""
        wanted = wanted_replicas(self._run_dir)
        if wanted is None or wanted == self._told:
            self._leaving = None
            return
        if time.monotonic() < self._wait_until:
            return
        if wanted >= self._replicas:
            self._leaving = None
        elif wanted != self._leaving:
            self._leaving, self._wait_until = wanted, time.monotonic() + DRAIN_SECONDS
            return
        try:
            await self._launcher.scale(wanted)
        except JackpotError as error:
            self._wait_until = time.monotonic() + RETRY_SECONDS
            if self._refused != (wanted, str(error)):
                self._refused = (wanted, str(error))
                self._record(wanted, str(error))
            return
        if wanted != self._replicas:
            self._record(wanted, None)
        self._replicas = self._told = wanted
        self._refused = self._leaving = None

    def _record(self, wanted: int, error: str | None) -> None:
        row = {"time": time.time(), "rollout_replicas": wanted, "before": self._replicas, "error": error}
        failed = "" if error is None else f" failed: {error}"
        # Standard output is reserved for the job's result: with --json a program reads it.
        print(f"rollout replicas: {self._replicas} → {wanted}{failed}", file=sys.stderr, flush=True)
        self._writer.append([row])
