"""What a service spends its time on: seconds by activity, for metrics and for the run's summary.

An activity is either work or a wait for something. Several kinds of work may overlap (weights are published while the
next step trains), so each activity is measured separately: the seconds in which at least one piece of it was running.
A service's busy fraction is its main work's share of the wall time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jackpot.storage.run_directory import RunFiles
from jackpot.storage.run_records import ActivityRecord
from jackpot.telemetry import Metrics

WRITE_SECONDS = 2.0
"""How often a record is rewritten while its service works."""


class Activity:
    """The clock of one process. Safe to use from several threads.

    Args:
        metrics: counts the seconds, see :meth:`Metrics.count_activity`.
        service: ``rollout``, ``scorer``, ``learner`` or ``orchestrator``.
        instance: which replica.
        run_dir: the run directory, or None to write no record.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        metrics: Metrics,
        service: str,
        instance: str,
        run_dir: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._service = service
        self._instance = instance
        self._files = None if run_dir is None else RunFiles(run_dir)
        self._clock = clock
        self._lock = threading.Lock()
        self._began = self._written = clock()
        self._seconds: dict[str, float] = {}
        self._open: dict[str, tuple[int, float]] = {}  # running pieces, and since when they are counted

    @contextmanager
    def doing(self, name: str) -> Iterator[None]:
        """Count the time of the block as the activity ``name``."""
        with self._lock:
            pieces, since = self._open.get(name, (0, self._clock()))
            self._open[name] = (pieces + 1, since)
        try:
            yield
        finally:
            with self._lock:
                self._settle(name)
                pieces, since = self._open[name]
                if pieces == 1:
                    del self._open[name]
                else:
                    self._open[name] = (pieces - 1, since)
                due = self._clock() - self._written > WRITE_SECONDS
            if due:
                self.write()

    def seconds(self) -> Mapping[str, float]:
        """Seconds by activity so far, running pieces included."""
        with self._lock:
            for name in self._open:
                self._settle(name)
            return dict(self._seconds)

    def write(self) -> None:
        """Write the record into the run directory, atomically.

        Raises:
            OSError: the disk is full or gone.
        """
        seconds = self.seconds()
        with self._lock:
            self._written = self._clock()
            if self._files is not None:
                ActivityRecord(self._service, seconds, self._written - self._began).write(self._files, self._instance)

    def _settle(self, name: str) -> None:
        """Add the time since the last look to the sum."""
        pieces, since = self._open[name]
        now = self._clock()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - since
        self._metrics.count_activity(name, now - since)
        self._open[name] = (pieces, now)
