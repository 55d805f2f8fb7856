"""Monitors, rules, dashboards, certificates and routes: kinds that no Kubernetes schema knows."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import yaml
from chart_world import CHART, Object, named, of_kind, parse, pods, render, render_text

GPU = CHART / "ci" / "gpu-cluster-values.yaml"
EXTERNAL = CHART / "ci" / "external-redis-tls-values.yaml"


def test_the_control_plane_is_scraped_over_tls_with_a_token_that_only_reads() -> None:
    objects = render(GPU)
    monitor = named(objects, "ServiceMonitor", "jp-jackpot-control-plane")
    service = named(objects, "Service", "jp-jackpot-control-plane")
    assert set(monitor["spec"]["selector"]["matchLabels"].items()) <= set(service["metadata"]["labels"].items())
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["scheme"] == "https"
    host = endpoint["tlsConfig"]["serverName"]
    certificate = named(objects, "Certificate", endpoint["tlsConfig"]["ca"]["secret"]["name"])
    assert host in certificate["spec"]["dnsNames"]
    credentials = endpoint["authorization"]["credentials"]
    assert credentials["key"] in named(objects, "Secret", credentials["name"])["data"]
    assert monitor["metadata"]["labels"]["release"] == "kube-prometheus-stack"


def test_behind_a_proxy_with_tls_the_control_plane_is_scraped_in_plaintext() -> None:
    (endpoint,) = named(render(EXTERNAL), "ServiceMonitor", "jp-jackpot-control-plane")["spec"]["endpoints"]
    assert endpoint["scheme"] == "http" and "tlsConfig" not in endpoint
    assert endpoint["authorization"]["credentials"] == {"name": "jackpot-tokens", "key": "metrics-token"}


def test_the_pods_of_jobs_are_scraped_and_keep_the_labels_of_the_job() -> None:
    monitor = named(render(GPU), "PodMonitor", "jp-jackpot-workers")["spec"]
    assert monitor["selector"]["matchLabels"] == {
        "app.kubernetes.io/name": "jackpot",
        "app.kubernetes.io/instance": "jp",
    }
    (expression,) = monitor["selector"]["matchExpressions"]
    assert set(expression["values"]) == {"orchestrator", "rollout", "evaluator", "scorer", "learner"}
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["honorLabels"] is True
    targets = {each["targetLabel"]: each.get("sourceLabels") for each in endpoint["relabelings"]}
    assert targets["job_id"] == ["__meta_kubernetes_pod_label_jackpot_job_id"]
    assert set(targets) == {"job_id", "service", "instance"}


def chart_with(directory: Path, files: dict[str, str]) -> Path:
    """A copy of the chart whose rules and dashboards are these alone."""
    copy = directory / "jackpot"
    shutil.copytree(CHART, copy, ignore=shutil.ignore_patterns("rules", "dashboards"))
    for name, text in files.items():
        path = copy / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return copy


def test_rules_and_dashboards_reach_the_cluster_to_the_letter(tmp_path: Path) -> None:
    rules = {
        "groups": [
            {
                "name": "obrs",
                "rules": [
                    {
                        "alert": "A",
                        "expr": 'x{job_id=~".+"} > 1',
                        "annotations": {"summary": "{{ $labels.job_id }} is at {{ printf `%.2f` $value }}"},
                    }
                ],
            }
        ]
    }
    dashboard = {"title": "Überblick", "panels": [{"legendFormat": "{{job_id}}", "expr": 'a{b="$job"}\n  / c'}]}
    files = {"rules/some_alerts.yaml": yaml.safe_dump(rules), "dashboards/job.json": json.dumps(dashboard, indent=2)}
    objects = parse(render_text(GPU, chart=chart_with(tmp_path, files)))
    (rule,) = of_kind(objects, "PrometheusRule")
    assert rule["metadata"]["name"] == "jp-jackpot-some-alerts"
    assert rule["spec"] == rules
    found = named(objects, "ConfigMap", "jp-jackpot-dashboard-job")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert found["metadata"]["annotations"] == {"grafana_folder": "Jackpot"}
    assert json.loads(found["data"]["job.json"]) == dashboard


def test_without_rules_and_dashboards_the_chart_renders_none(tmp_path: Path) -> None:
    objects = parse(render_text(GPU, chart=chart_with(tmp_path, {})))
    assert not of_kind(objects, "PrometheusRule")
    assert not [each for each in of_kind(objects, "ConfigMap") if "dashboard" in each["metadata"]["name"]]


def test_every_rule_and_dashboard_of_the_chart_is_installed_and_small_enough() -> None:
    objects = render(GPU)
    rules = [path.read_text(encoding="utf-8") for path in sorted((CHART / "rules").glob("*.yaml"))]
    assert [each["spec"] for each in of_kind(objects, "PrometheusRule")] == [yaml.safe_load(text) for text in rules]
    dashboards = {path.name: path.read_text(encoding="utf-8") for path in (CHART / "dashboards").glob("*.json")}
    installed: dict[str, str] = {}
    for each in of_kind(objects, "ConfigMap"):
        if "-dashboard-" in each["metadata"]["name"]:
            installed |= each["data"]
    assert {name: json.loads(text) for name, text in installed.items()} == {
        name: json.loads(text) for name, text in dashboards.items()
    }
    assert all(len(text.encode()) < 900_000 for text in installed.values())


def test_nothing_is_monitored_unless_asked_for() -> None:
    kinds = {each["kind"] for each in render()}
    assert not kinds & {"ServiceMonitor", "PodMonitor", "PrometheusRule", "HTTPRoute", "Ingress"}


def certificates(objects: tuple[Object, ...]) -> dict[str, Object]:
    return {each["metadata"]["name"]: each["spec"] for each in of_kind(objects, "Certificate")}


def test_the_release_has_an_authority_of_its_own_unless_an_issuer_is_named() -> None:
    found = certificates(tuple(render()))
    assert set(found) == {
        "jp-jackpot-authority",
        "jp-jackpot-control-plane-tls",
        "jp-jackpot-worker-tls",
        "jp-jackpot-redis-tls",
    }
    authority = found.pop("jp-jackpot-authority")
    assert authority["isCA"] is True and authority["issuerRef"]["name"] == "jp-jackpot-self-signed"
    issuers = {each["metadata"]["name"]: each["spec"] for each in of_kind(render(), "Issuer")}
    assert issuers == {
        "jp-jackpot-self-signed": {"selfSigned": {}},
        "jp-jackpot-authority": {"ca": {"secretName": authority["secretName"]}},
    }
    assert {each["issuerRef"]["name"] for each in found.values()} == {"jp-jackpot-authority"}
    assert found["jp-jackpot-worker-tls"]["dnsNames"] == ["jackpot-worker"]
    # Both show their certificate to Redis, too, which looks at what it may be used for.
    for name in ("jp-jackpot-worker-tls", "jp-jackpot-control-plane-tls"):
        assert set(found[name]["usages"]) >= {"server auth", "client auth"}
    assert "jp-jackpot-redis.ml.svc" in found["jp-jackpot-redis-tls"]["dnsNames"]

    named_issuer = certificates(tuple(render(GPU)))
    assert not of_kind(render(GPU), "Issuer")
    reference = {"name": "cluster-authority", "kind": "ClusterIssuer", "group": "cert-manager.io"}
    assert all(each["issuerRef"] == reference for each in named_issuer.values())
    assert "jackpot.example.com" in named_issuer["jp-jackpot-control-plane-tls"]["dnsNames"]
    assert not certificates(tuple(render(EXTERNAL)))


def test_every_secret_that_a_pod_mounts_is_made_here_or_named_by_the_values() -> None:
    for values in (None, GPU, EXTERNAL, CHART / "ci" / "no-monitoring-values.yaml"):
        objects = render(values)
        made = {each["metadata"]["name"] for each in of_kind(objects, "Secret")}
        made |= {each["spec"]["secretName"] for each in of_kind(objects, "Certificate")}
        given = set(re.findall(r"existingSecret: ([\w-]+)", values.read_text() if values else ""))
        for owner, _, spec in pods(objects):
            mounted = {volume["secret"]["secretName"] for volume in spec["volumes"] if "secret" in volume}
            assert mounted and mounted <= made | given, owner


def test_the_gateways_route_leads_to_the_service_and_lets_streams_last() -> None:
    objects = render(EXTERNAL)
    route = named(objects, "HTTPRoute", "jp-jackpot-control-plane")["spec"]
    service = named(objects, "Service", "jp-jackpot-control-plane")
    assert route["parentRefs"] == [{"name": "public", "namespace": "gateways", "sectionName": "https"}]
    assert route["hostnames"] == ["jackpot.example.com"]
    (rule,) = route["rules"]
    assert rule["backendRefs"] == [{"name": "jp-jackpot-control-plane", "port": service["spec"]["ports"][0]["port"]}]
    assert rule["timeouts"] == {"request": "0s"}


def test_the_ingress_always_has_tls() -> None:
    ingress = named(render(GPU), "Ingress", "jp-jackpot-control-plane")["spec"]
    assert ingress["tls"] == [{"hosts": ["jackpot.example.com"], "secretName": "jackpot-example-com"}]
    assert [each["host"] for each in ingress["rules"]] == ["jackpot.example.com"]
