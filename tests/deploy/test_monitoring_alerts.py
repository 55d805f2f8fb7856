"""The alerts: by promtool's own tests, and each one fired by metrics that our own code serves."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from monitoring_world import RULES, binary, free_port, prometheus
from patience import PATIENCE_SECONDS, TEST_SECONDS
from prometheus_client import CollectorRegistry

from jackpot.control_plane.jobs.states import JobState
from jackpot.control_plane.service_metrics import ServiceMetrics
from jackpot.telemetry import Metrics, recording, serve_metrics

pytestmark = pytest.mark.timeout(TEST_SECONDS)

TESTS = sorted((Path(__file__).parent / "rules").glob("*.test.yaml"))
JOB = "sick"


def alert_rules() -> list[dict[str, Any]]:
    files = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(RULES.glob("*.yaml"))]
    return [rule for file in files for group in file["groups"] for rule in group["rules"] if "alert" in rule]


def test_promtool_accepts_the_rules() -> None:
    files = [str(path) for path in sorted(RULES.glob("*.yaml"))]
    done = subprocess.run(
        [binary("promtool"), "check", "rules", *files], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_not_else(path: Path) -> None:
    done = subprocess.run(
        [binary("promtool"), "test", "rules", path.name],
        cwd=path.parent,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_is_asked_about_every_alert_both_ways() -> None:
    fires, stays_quiet = set(), set()
    for path in TESTS:
        for test in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]:
            for case in test["alert_rule_test"]:
                (fires if case["exp_alerts"] else stays_quiet).add(case["alertname"])
    names = {rule["alert"] for rule in alert_rules()}
    assert fires == names and stays_quiet == names


def impatient_rules(directory: Path) -> list[Path]:
    """The rules as they are, but for how long they wait."""
    written = []
    for path in sorted(RULES.glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for group in content["groups"]:
            for rule in group["rules"]:
                rule.pop("for", None)
        written.append(directory / path.name)
        written[-1].write_text(yaml.safe_dump(content), encoding="utf-8")
    return written


class Depths:
    rollouts_waiting = rollouts_pending = scored_waiting = scored_pending = 0
    bytes_used, bytes_budget = 1, 2


def fall_ill(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that can be wrong with a job, shown through the calls that its processes make."""
    with monkeypatch.context() as patch:
        patch.setattr(recording.time, "time", lambda began=time.time(): began - 4000)  # noqa: B008
        metrics.observe_plan(100, staleness_limit=1)
        metrics.observe_step(
            {
                "step": 7,
                "rollout_corr/obrs_acceptance_rate": 0.04,
                "kl/policy_actor": 6.0,
                "rollout_corr/k3_kl": 9.0,
                "reward/std": 0.0,
                "staleness/max": 5.0,
                "time/step_seconds": 2.0,
            }
        )
    metrics.observe_alarms({"low_acceptance": True, "canary": True})
    metrics.observe_replicas(ready=1, wanted=2)
    metrics.observe_newest_weights({"actor": 20})
    metrics.observe_weights("actor", 3, load_seconds=0.1)
    metrics.observe_bus(Depths())
    metrics.observe_bus_server(used_bytes=95, limit_bytes=100)
    metrics.observe_run_volume(free_bytes=1, size_bytes=100)
    metrics.expect_groups()


def recover(metrics: Metrics) -> None:
    """The same job, well again."""
    metrics.observe_plan(100, staleness_limit=1)
    metrics.observe_step(
        {
            "step": 8,
            "rollout_corr/obrs_acceptance_rate": 0.9,
            "kl/policy_actor": 0.1,
            "rollout_corr/k3_kl": 0.1,
            "reward/std": 0.4,
            "staleness/max": 1.0,
        }
    )
    metrics.observe_alarms({"low_acceptance": False, "canary": False})
    metrics.observe_replicas(ready=2, wanted=2)
    metrics.observe_weights("actor", 20, load_seconds=0.1)
    metrics.observe_bus_server(used_bytes=5, limit_bytes=100)
    metrics.observe_run_volume(free_bytes=90, size_bytes=100)


def test_every_alert_fires_on_what_our_own_code_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    metrics, service = Metrics(JOB, registry), ServiceMetrics()
    fall_ill(metrics, monkeypatch)
    job_port = serve_metrics("127.0.0.1:0", registry)
    plane_port = serve_metrics("127.0.0.1:0", service._registry)
    labels = {"job_id": JOB, "service": "learner", "instance": "learner-0"}
    scrape = [
        {
            "job_name": "jobs",
            "static_configs": [
                {"targets": [f"127.0.0.1:{job_port}"], "labels": labels},
                # A process that has gone.
                {"targets": [f"127.0.0.1:{free_port()}"], "labels": labels | {"instance": "scorer-0"}},
            ],
        },
        {
            "job_name": "control-plane",
            "static_configs": [{"targets": [f"127.0.0.1:{plane_port}"], "labels": {"service": "control-plane"}}],
        },
    ]
    service.count_request("GET", "/v1/jobs", 503, 0.01)
    service.render({JobState.RUNNING: 1})
    with prometheus(tmp_path / "prometheus", scrape, rule_files=impatient_rules(tmp_path)) as server:
        server.wait_for("jackpot_groups_total and on () jackpot_api_requests_total")
        # Counters tell of what happens between two looks.
        metrics.count_group("dropped", "scoring_failed")
        metrics.count_group("dropped", "stale")
        for _ in range(10):
            service.request_began()
            service.count_request("GET", "/v1/jobs", 503, 0.01)
        for rule in alert_rules():
            server.wait_for(f'ALERTS{{alertname="{rule["alert"]}",alertstate="firing"}}')
        recover(metrics)
        lasting = ("JackpotProcessDown", "JackpotDeadLetters", "JackpotStaleGroups", "JackpotControlPlaneErrors")
        passing = "|".join(rule["alert"] for rule in alert_rules() if rule["alert"] not in lasting)
        server.wait_for(f'absent(ALERTS{{alertname=~"{passing}",alertstate="firing"}})')
