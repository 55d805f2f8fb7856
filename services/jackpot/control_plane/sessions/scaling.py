"""A session's part in scaling: what is wished for in the run directory, the launcher is told."""

from __future__ import annotations

import json
import time
from pathlib import Path

from jackpot.control_plane.launch.launcher import Launcher
from jackpot.control_plane.run_directory import RunDirectory
from jackpot.errors import ConfigError, JackpotError, JobStateError
from jackpot.runtime.scaling import wish_rollout_replicas, wished_rollout_replicas

SCALINGS = "scalings.jsonl"
RETRY_SECONDS = 5.0
DRAIN_SECONDS = 2.0
"""From a wish for fewer replicas until they are told to end: the orchestrator looks every half second, and by then asks
those that leave for nothing more."""


def request_scale(run: RunDirectory, replicas: int) -> None:
    """Wish for a number of rollout replicas; the session that runs the job, or the next one, sees to it.

    Raises:
        ConfigError: the number is out of bounds, or the job's replicas cannot change.
        JobStateError: the job has succeeded.
    """
    if (run.summary or {}).get("state") == "succeeded":
        raise JobStateError(f"{run.job_id} has succeeded already; only a job that runs can be scaled")
    transport = run.load_job().weights.transport
    if transport != "store":
        raise ConfigError(
            "weights.transport",
            transport,
            "broadcasts weights to the rollout replicas that the job began with, whose number cannot change",
            "Set it to store in a job that is to be scaled.",
        )
    wish_rollout_replicas(run.path, replicas)


def rollout_replicas(run_dir: Path, configured: int) -> int:
    """How many rollout replicas a job should have: what was wished for, else what its job file says."""
    wish = wished_rollout_replicas(run_dir)
    return configured if wish is None else wish


class Scaling:
    """Follows ``scale.json``. Each change, and each first refusal of one, is a row of ``scalings.jsonl``.

    Args:
        run_dir: the run directory.
        launcher: the job's, started.
        replicas: rollout replicas that the launcher has started.
    """

    def __init__(self, run_dir: Path, launcher: Launcher, replicas: int) -> None:
        self._run_dir = run_dir
        self._launcher = launcher
        self._replicas = replicas
        self._told: int | None = None  # a launcher that takes over a job as it stands does not know how it was scaled
        self._refused: tuple[int, str] | None = None
        self._wait_until = 0.0
        self._leaving: int | None = None  # a wish for fewer, while the orchestrator is given time to see it

    async def look(self) -> None:
        """Have the launcher run what is wished for. What it cannot do is asked for again; the job goes on meanwhile."""
        wish = wished_rollout_replicas(self._run_dir)
        if wish is None or wish == self._told or time.monotonic() < self._wait_until:
            return
        if wish < self._replicas and wish != self._leaving:
            self._leaving, self._wait_until = wish, time.monotonic() + DRAIN_SECONDS
            return
        try:
            await self._launcher.scale(wish)
        except JackpotError as error:
            self._wait_until = time.monotonic() + RETRY_SECONDS
            if self._refused != (wish, str(error)):
                self._refused = (wish, str(error))
                self._record(wish, str(error))
            return
        if wish != self._replicas:
            self._record(wish, None)
        self._replicas = self._told = wish
        self._refused = self._leaving = None

    def _record(self, wish: int, error: str | None) -> None:
        row = {"time": time.time(), "rollout_replicas": wish, "before": self._replicas, "error": error}
        print(f"rollout replicas: {self._replicas} → {wish}{'' if error is None else f' failed: {error}'}", flush=True)
        with (self._run_dir / SCALINGS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
