"""Alarms of a run, where they go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from jackpot.config import AlarmsConfig
from jackpot.errors import AlarmError, JobFailedError
from jackpot.learner.reports.alarm_log import AlarmLog
from jackpot.telemetry import Metrics

FAR_APART = {"step": 7, "reward/mean": 0.5, "reward/std": 0.5, "policy/grad_norm": 1.0, "kl/policy_actor": 9.0}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_an_alarm_is_logged_written_and_counted(
    tmp_path: Path, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    log = AlarmLog(AlarmsConfig(), tmp_path, Metrics("job-1", registry))
    alarms = log.look([FAR_APART])
    assert [alarm.name for alarm in alarms] == ["kl_too_large"]
    (line,) = (tmp_path / "alarms.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["name"], record["step"]) == ("kl_too_large", 7)
    assert "9 nats per token apart, more than 5.0" in record["message"]
    assert "alarm kl_too_large at step 7" in caplog.text
    labels = {"job_id": "job-1", "alarm": "kl_too_large"}
    assert registry.get_sample_value("jackpot_alarms_total", labels) == 1
    log.stop_on(alarms)  # a warning stops nothing


def test_an_alarm_stops_the_job_that_asks_for_it(tmp_path: Path, registry: CollectorRegistry) -> None:
    log = AlarmLog(AlarmsConfig(action="stop"), tmp_path, Metrics("job-1", registry))
    log.stop_on([])
    with pytest.raises(JobFailedError, match=r"alarm kl_too_large at step 7: .* The job stops because alarms\.action"):
        log.stop_on(log.look([FAR_APART]))
    assert AlarmError.exit_code == 70


def test_evaluations_are_read_as_they_are_written(tmp_path: Path, registry: CollectorRegistry) -> None:
    log = AlarmLog(AlarmsConfig(), tmp_path, Metrics("job-1", registry))
    path = tmp_path / "evaluations.jsonl"
    healthy = {**FAR_APART, "kl/policy_actor": 0.1}
    found = []
    for index, accuracy in enumerate((0.8, 0.5, 0.4)):
        with path.open("a") as file:
            file.write(json.dumps({"step": index, "policy_accuracy": accuracy}) + "\n" + '{"step": 99, "policy_acc')
        found.append(log.look([{**healthy, "step": index, "reward/mean": index / 3}]))
        path.write_text(path.read_text().removesuffix('{"step": 99, "policy_acc'))  # the half line, finished later
    assert [[alarm.name for alarm in alarms] for alarms in found] == [[], [], ["accuracy_falls"]]
    assert found[2][0].step == 2
