"""The committed dashboards: generated, complete, and asking for what there is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from monitoring_world import DASHBOARDS, ROOT, RULES, PanelQuery, panels, queries
from patience import PATIENCE_SECONDS

from jackpot.control_plane.service_metrics import CATALOGUE as CONTROL_PLANE
from jackpot.telemetry import CATALOGUE, MetricSpec

NAMES = ("bus", "job", "overview", "services")
# What is neither ours nor made by our rules: Prometheus's own, the Python client's, vLLM's.
FOREIGN = re.compile(
    r"up|ALERTS|process_(cpu_seconds_total|resident_memory_bytes|open_fds|max_fds|start_time_seconds)|vllm:\w+"
)
_WORDS = re.compile(r"\b(?:jackpot_|vllm:|process_)\w+")


def exposed(spec: MetricSpec) -> set[str]:
    endings = {"histogram": ("_bucket", "_sum", "_count")}.get(spec.kind)
    return {spec.name + ending for ending in endings} if endings else {spec.exposed_name}


KNOWN = {name for spec in (*CATALOGUE.values(), *CONTROL_PLANE.values()) for name in exposed(spec)}
LABELS = {label for spec in (*CATALOGUE.values(), *CONTROL_PLANE.values()) for label in spec.labels}
LABELS |= {"job_id", "namespace", "service", "instance", "le", "alertname", "alertstate"}


def load(name: str) -> dict[str, Any]:
    dashboard: dict[str, Any] = json.loads((DASHBOARDS / f"{name}.json").read_text(encoding="utf-8"))
    return dashboard


def test_the_committed_dashboards_are_what_the_code_generates(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "deploy/grafana/generate.py"), str(tmp_path)], check=True, timeout=PATIENCE_SECONDS
    )
    assert {path.stem for path in DASHBOARDS.glob("*.json")} == set(NAMES)
    for name in NAMES:
        generated = (tmp_path / f"{name}.json").read_text(encoding="utf-8")
        assert (DASHBOARDS / f"{name}.json").read_text(encoding="utf-8") == generated, (
            "run: python deploy/grafana/generate.py"
        )


@pytest.mark.parametrize("query", queries(), ids=str)
def test_a_query_parses_and_asks_for_metrics_that_there_are(query: PanelQuery) -> None:
    text = query.expanded("a|b", "1m").replace("$__range", "1h")
    assert "$" not in text, "a variable that nobody sets"
    promql_parser.parse(text)
    for name in _WORDS.findall(re.sub(r'"[^"]*"', '""', text)):
        assert name in KNOWN or FOREIGN.fullmatch(name), name
    for label in re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)", text):
        assert label in LABELS, label
    assert 'namespace=~".*"' in text, "every query can be narrowed to a namespace"


@pytest.mark.parametrize("name", NAMES)
def test_every_panel_can_be_read(name: str) -> None:
    dashboard, seen = load(name), set()
    assert dashboard["uid"] == f"jackpot-{name}" and dashboard["description"] and dashboard["tags"] == ["jackpot"]
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert list(variables) == ["datasource", "namespace", "job"]
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    assert variables["job"].get("multi", False) == (name != "job")
    links = [link for link in dashboard["links"] if link["type"] == "dashboards"]
    assert links[0]["tags"] == ["jackpot"] and links[0]["includeVars"] and links[0]["keepTime"]
    for row, panel in panels(name):
        assert row.endswith(("?", "(OBRS)", "(RPC)", "(REST)")), f"{row} is no question"
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["targets"] and all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
        if panel["type"] != "heatmap":
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert (row, panel["title"]) not in seen
        seen.add((row, panel["title"]))


@pytest.mark.parametrize("name", NAMES)
def test_panels_do_not_lie_upon_each_other(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in load(name)["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("name", ["job", "overview"])
def test_the_acceptance_rate_comes_first(name: str) -> None:
    first = next(iter(panels(name)))[1]
    assert "cceptance rate" in first["title"] and "jackpot_obrs_acceptance_ratio" in first["targets"][0]["expr"]


def test_rules_ask_for_metrics_that_there_are_and_every_alert_has_a_runbook() -> None:
    runbooks = (ROOT / "docs" / "alerts.md").read_text(encoding="utf-8")
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    alerts = [rule for rule in rules() if "alert" in rule]
    for rule in rules():
        promql_parser.parse(rule["expr"])
        without_strings = re.sub(r'"[^"]*"', '""', rule["expr"])
        for name in re.findall(r"\bjackpot[_:][\w:]+", without_strings):
            assert name in KNOWN | recorded, name
    for rule in alerts:
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["runbook_url"] == f"docs/alerts.md#{rule['alert'].lower()}"
        assert f"## {rule['alert']}\n" in runbooks
    assert set(re.findall(r"^## (Jackpot\w+)$", runbooks, re.M)) == {rule["alert"] for rule in alerts}


def rules() -> list[dict[str, Any]]:
    """Every rule of every file."""
    files = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(RULES.glob("*.yaml"))]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]
