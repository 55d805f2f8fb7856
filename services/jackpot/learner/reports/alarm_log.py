"""Alarms of a run: written to the log, ``alarms.jsonl`` and Prometheus. They stop the job if it asks for that."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from jackpot.config import AlarmsConfig
from jackpot.errors import AlarmError
from jackpot.storage.json_files import JsonLinesReader, JsonLinesWriter
from jackpot.storage.run_directory import RunFiles
from jackpot.storage.run_records import HeldOutAccuracy
from jackpot.telemetry import Metrics
from jackpot.telemetry.alarms import Alarm, AlarmWatch

LOG = logging.getLogger(__name__)


class AlarmLog:
    """Watches a run's steps, and its evaluations as the orchestrator writes them.

    Args:
        config: the job's alarms.
        run_dir: the run directory.
        metrics: counts alarms.
        exact: as of :class:`AlarmWatch`.
    """

    def __init__(self, config: AlarmsConfig, run_dir: Path, metrics: Metrics, *, exact: bool = True) -> None:
        self._config = config
        self._watch = AlarmWatch(config, exact=exact)
        self._metrics = metrics
        files = RunFiles(run_dir)
        self._writer = JsonLinesWriter(files.alarms)
        self._evaluations = JsonLinesReader(files.evaluations)

    def look(self, rows: Sequence[Mapping[str, float]]) -> list[Alarm]:
        """Check the steps of a batch and the evaluations since the last call; returns the alarms that begin."""
        alarms = [alarm for figures in rows for alarm in self._watch.observe_step(figures)]
        for row in self._evaluations.records(HeldOutAccuracy):
            if row.comparable:
                alarms += self._watch.observe_evaluation(row.step, row.policy_accuracy)
        for alarm in alarms:
            LOG.warning("alarm %s at step %d: %s", alarm.name, alarm.step, alarm.message)
            self._metrics.count_alarm(alarm.name)
        self._metrics.observe_alarms(self._watch.active)
        self._writer.append({**asdict(alarm), "time": time.time()} for alarm in alarms)
        return alarms

    def stop_on(self, alarms: Sequence[Alarm]) -> None:
        """End the job if there is an alarm and the job asks for that.

        Raises:
            AlarmError: with the first alarm.
        """
        if alarms and self._config.action == "stop":
            first = alarms[0]
            raise AlarmError(
                f"alarm {first.name} at step {first.step}: {first.message} The job stops because alarms.action is "
                "'stop'; the last checkpoint holds this step."
            )
