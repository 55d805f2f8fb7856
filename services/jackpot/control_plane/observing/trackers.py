"""Experiment trackers: a run's steps and evaluations in TensorBoard's files or in Weights & Biases.

They follow the run directory's files from the session's own process, so that they include the last evaluation, which
comes after the last step. A tracker's errors are logged and stop nothing: the files hold every row.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jackpot.config import JobSpec
from jackpot.errors import ConfigError
from jackpot.storage.json_files import Row, read_object_if_whole, replace_json
from jackpot.storage.run_directory import RunDirectory
from jackpot.storage.run_records import StepRows

LOG = logging.getLogger(__name__)

FOLLOW_SECONDS = 1.0
CLOSE_SECONDS = 30.0


class Tracker(Protocol):
    """Where rows of numbers go."""

    def log(self, step: int, moment: float, row: Mapping[str, float]) -> None:
        """Record columns of a step; ``moment`` in seconds since the epoch."""

    def close(self) -> None:
        """Flush all rows."""


class TensorboardTracker:
    """Scalars in ``tensorboard/`` of the run directory: `tensorboard --logdir runs`."""

    def __init__(self, run: RunDirectory, job: JobSpec) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(run.files.tensorboard))

    def log(self, step: int, moment: float, row: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        self._writer.add_event(Event(step=step, wall_time=moment, summary=Summary(value=values)))

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A run in Weights & Biases, with the job's id as its own, so that a resumed job continues it."""

    def __init__(self, run: RunDirectory, job: JobSpec) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=job.tracking.wandb_project,
            mode=job.tracking.wandb_mode,
            id=run.job_id,
            name=run.job_id,
            config=job.model_dump(mode="json"),
            dir=str(run.path),
            resume="allow",
        )
        # Evaluations arrive after later steps: W&B's own axis only goes forward, so they get a separate one.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, moment: float, row: Mapping[str, float]) -> None:
        self._run.log({**row, "step": step})

    def close(self) -> None:
        self._run.finish()


_TRACKERS: Mapping[str, tuple[Callable[[RunDirectory, JobSpec], Tracker], str]] = {
    "tensorboard": (TensorboardTracker, "tensorboard.summary.writer.event_file_writer"),
    "wandb": (WandbTracker, "wandb"),
}


def require_trackers(job: JobSpec) -> None:
    """Check that the packages of the job's trackers are installed.

    Raises:
        ConfigError: it is not.
    """
    for name in job.tracking.trackers:
        try:
            importlib.import_module(_TRACKERS[name][1])
        except ImportError as error:
            problem = f"needs a package that is not installed ({error})"
            raise ConfigError("tracking.trackers", name, problem, f"pip install 'jackpot[{name}]'") from None


class TrackerFeed:
    """Follows a run's files and passes every row to the job's trackers once, over all sessions of the run.

    Args:
        run: the run directory.
        job: the job as resolved.
    """

    def __init__(self, run: RunDirectory, job: JobSpec) -> None:
        self._run = run
        self._job = job
        self._told = _read_state(run.files.trackers)
        self._steps = StepRows(run.files.metrics)
        self._evaluations = StepRows(run.files.evaluations)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="trackers", daemon=True)

    def __enter__(self) -> TrackerFeed:
        if self._job.tracking.trackers:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                LOG.warning("a tracker did not finish within %g s; it may lack the last rows", CLOSE_SECONDS)

    def _follow(self) -> None:
        trackers = [tracker for name in self._job.tracking.trackers if (tracker := self._open(name)) is not None]
        ended = False
        while not ended:
            ended = self._ended.wait(FOLLOW_SECONDS)
            self._tell(trackers, "", "steps", self._steps.refresh())
            self._tell(trackers, "evaluation/", "evaluations", self._evaluations.refresh())
        for tracker in trackers:
            self._attempt(tracker.close)

    def _open(self, name: str) -> Tracker | None:
        try:
            return _TRACKERS[name][0](self._run, self._job)
        except Exception as error:  # a tracker's package may raise anything: a server's refusal, a missing login
            LOG.warning("the tracker %s cannot be opened and is left out: %s", name, error)
            return None

    def _tell(self, trackers: Sequence[Tracker], prefix: str, kind: str, rows: Sequence[Row]) -> None:
        for row in rows:
            step = int(row["step"])
            if step <= self._told.get(kind, -1):
                continue
            numbers = {prefix + name: float(value) for name, value in row.items() if _is_figure(name, value)}
            for tracker in trackers:
                self._attempt(tracker.log, step, float(row.get("time", time.time())), numbers)
            self._told[kind] = step
        replace_json(self._run.files.trackers, self._told)

    def _attempt(self, call: Any, *arguments: object) -> None:
        try:
            call(*arguments)
        except Exception as error:  # as in _open
            LOG.warning("a tracker failed: %s", error)


def _is_figure(name: str, value: object) -> bool:
    return name not in ("step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool)


def _read_state(path: Path) -> dict[str, int]:
    """The last step passed to the trackers, by kind of row, over all sessions of the run."""
    state = read_object_if_whole(path) or {}
    return {kind: step for kind in ("steps", "evaluations") if isinstance(step := state.get(kind), int)}
