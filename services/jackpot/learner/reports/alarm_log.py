"""Alarms of a run: to the log, to ``alarms.jsonl``, to Prometheus, and to the end of the job where it is asked for."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from jackpot.config import AlarmsConfig
from jackpot.errors import AlarmError
from jackpot.telemetry import Metrics
from jackpot.telemetry.alarms import Alarm, AlarmWatch

LOG = logging.getLogger(__name__)


class AlarmLog:
    """Watches a run's steps, and its evaluations as the orchestrator writes them down.

    Args:
        config: the job's alarms.
        run_dir: the run directory.
        metrics: where alarms are counted.
    """

    def __init__(self, config: AlarmsConfig, run_dir: Path, metrics: Metrics) -> None:
        self._config = config
        self._watch = AlarmWatch(config)
        self._metrics = metrics
        self._path = run_dir / "alarms.jsonl"
        self._evaluations = run_dir / "evaluations.jsonl"
        self._read_bytes = 0

    def look(self, rows: Sequence[Mapping[str, float]]) -> list[Alarm]:
        """Look at the steps of a batch and at the evaluations since the last look; the alarms that begin."""
        alarms = [alarm for row in rows for alarm in self._watch.observe_step(row)]
        for step, accuracy in self._new_evaluations():
            alarms += self._watch.observe_evaluation(step, accuracy)
        for alarm in alarms:
            LOG.warning("alarm %s at step %d: %s", alarm.name, alarm.step, alarm.message)
            self._metrics.count_alarm(alarm.name)
        self._metrics.observe_alarms(self._watch.active)
        if alarms:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({**asdict(alarm), "time": time.time()}) + "\n" for alarm in alarms)
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

    def _new_evaluations(self) -> list[tuple[int, float]]:
        """Whole lines only: the orchestrator may be in the middle of one."""
        try:
            with self._evaluations.open("rb") as file:
                file.seek(self._read_bytes)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        found = []
        for line in whole.splitlines():
            try:
                row = json.loads(line)
                found.append((int(row["step"]), float(row["policy_accuracy"])))
            except (ValueError, KeyError, TypeError):
                LOG.warning("a line of %s cannot be read and is skipped", self._evaluations)
        return found
