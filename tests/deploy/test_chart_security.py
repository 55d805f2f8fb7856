"""What the chart's pods may do: on their node, on the network, with the Kubernetes API."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from chart_world import CHART, ROOT, VALUES_FILES, Object, containers, named, of_kind, pods, render, values_id

WORKERS = {"orchestrator", "rollout", "evaluator", "scorer", "learner"}
COMPONENTS = {"control-plane", "redis", "test", *WORKERS}
DIGEST = "sha256:" + "ab" * 32
every_values_file = pytest.mark.parametrize("values", VALUES_FILES, ids=values_id)


@every_values_file
def test_every_pod_meets_the_restricted_standard_and_more(values: Path) -> None:
    found = list(pods(render(values)))
    assert len(found) >= 2
    for owner, _, spec in found:
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] == 10001, owner
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, owner
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), owner
        allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
        assert all(set(volume) - {"name"} <= allowed for volume in spec["volumes"]), owner
        for container in containers(spec):
            limits = container["securityContext"]
            assert limits["allowPrivilegeEscalation"] is False, owner
            assert limits["readOnlyRootFilesystem"] is True, owner
            assert limits["capabilities"] == {"drop": ["ALL"]}, owner
            assert not {"privileged", "procMount"} & set(limits), owner
            assert "hostPort" not in str(container.get("ports")), owner
            assert container["resources"]["limits"]["memory"], owner
            assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"], owner


@every_values_file
def test_only_the_control_plane_speaks_to_the_kubernetes_api(values: Path) -> None:
    objects = render(values)
    mounting = {owner for owner, _, spec in pods(objects) if spec.get("automountServiceAccountToken") is not False}
    assert mounting == {"Deployment/jp-jackpot-control-plane"}
    assert all(each["automountServiceAccountToken"] is False for each in of_kind(objects, "ServiceAccount"))
    accounts = {each["metadata"]["name"] for each in of_kind(objects, "ServiceAccount")}
    used = {spec["serviceAccountName"] for _, _, spec in pods(objects)}
    assert used <= accounts and "jp-jackpot-worker" in accounts


# What a method of the client library asks of a Role: API group, resource, verb.
ASKS = {
    "create_namespaced_custom_object": ("jobset.x-k8s.io", "jobsets", "create"),
    "get_namespaced_custom_object": ("jobset.x-k8s.io", "jobsets", "get"),
    "list_namespaced_custom_object": ("jobset.x-k8s.io", "jobsets", "list"),
    "delete_namespaced_custom_object": ("jobset.x-k8s.io", "jobsets", "delete"),
    "list_namespaced_pod": ("", "pods", "list"),
    "list_namespaced_event": ("", "events", "list"),
    "read_namespaced_pod_log": ("", "pods/log", "get"),
    "list_namespaced_job": ("batch", "jobs", "list"),
    "create_namespaced_job": ("batch", "jobs", "create"),
    "patch_namespaced_job": ("batch", "jobs", "patch"),
    "delete_namespaced_job": ("batch", "jobs", "delete"),
}


def test_the_control_planes_role_is_exactly_what_the_launcher_calls() -> None:
    objects = render()
    rules = named(objects, "Role", "jp-jackpot-control-plane")["rules"]
    granted = {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    folder = ROOT / "services" / "jackpot" / "control_plane" / "launch" / "kubernetes"
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    called = set(re.findall(r"\b[a-z]+_namespaced_[a-z_]+\b", source))
    # A watch is a list that goes on.
    assert granted == {ASKS[method] for method in called} | {("jobset.x-k8s.io", "jobsets", "watch")}
    binding = named(objects, "RoleBinding", "jp-jackpot-control-plane")
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "jp-jackpot-control-plane", "namespace": "ml"}]
    assert not of_kind(objects, "ClusterRole", "ClusterRoleBinding")
    assert not of_kind(render(None, "rbac.create=false"), "Role", "RoleBinding")


def test_every_image_can_be_pinned_by_digest() -> None:
    roles = ("orchestrator", "rollout", "evaluator", "scorer", "learner")
    settings = [f'workers.roles.{role}.image.digest="{DIGEST}"' for role in roles]
    settings += [
        f'controlPlane.image.digest="{DIGEST}"',
        f'redis.image.digest="{DIGEST}"',
        'image.registry="r.example"',
    ]
    objects = render(None, *settings)
    images = [container["image"] for _, _, spec in pods(objects) for container in containers(spec)]
    cluster = named(objects, "ConfigMap", "jp-jackpot-cluster")["data"]["cluster.yaml"]
    images += re.findall(r"^    image: (\S+)$", cluster, re.MULTILINE)
    assert len(images) == 3 + len(roles)
    assert all(image.endswith(f"@{DIGEST}") for image in images)
    ours = [image for image in images if "valkey" not in image]
    assert all(image.startswith("r.example/jackpot-") for image in ours)


@every_values_file
def test_every_pod_has_the_probes_it_can_answer_and_time_to_end(values: Path) -> None:
    for owner, _, spec in pods(render(values)):
        if owner.startswith("Pod/"):
            continue
        (container,) = spec["containers"]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container), owner
        assert container["lifecycle"]["preStop"]["sleep"]["seconds"] < spec["terminationGracePeriodSeconds"], owner


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector takes a pod with these labels."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", ()):
        inside = labels.get(expression["key"]) in expression["values"]
        if inside != (expression["operator"] == "In"):
            return False
    return True


def labels_of(component: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "jackpot",
        "app.kubernetes.io/instance": "jp",
        "app.kubernetes.io/component": component,
    }


def allowed(objects: tuple[Object, ...], source: str, target: str, port: int | str) -> bool:
    """Whether the policies let ``source`` open a connection to ``port`` of ``target``, both components of the chart."""
    return all(
        any(
            any(selects(peer["podSelector"], labels_of(other)) for peer in rule[key] if "podSelector" in peer)
            and ("ports" not in rule or any(each["port"] == port for each in rule["ports"]))
            for policy in of_kind(objects, "NetworkPolicy")
            if selects(policy["spec"]["podSelector"], labels_of(mine))
            for rule in policy["spec"].get(direction, ())
            if key in rule
        )
        for direction, key, mine, other in (("egress", "to", source, target), ("ingress", "from", target, source))
    )


# Every way there is, from the architecture: who opens a connection to whom, on which port.
WAYS: set[tuple[str, str, Any]] = {
    *((source, "redis", 6379) for source in ("control-plane", "orchestrator", "scorer", "learner")),
    *(("orchestrator", target, 50051) for target in ("rollout", "evaluator", "scorer")),
    *(("control-plane", target, 9090) for target in WORKERS),
    ("test", "control-plane", "http"),
    # torchrun's rendezvous and NCCL draw their ports: between learners, and with those that take their weights.
    *(("learner", target, "any") for target in ("learner", "rollout", "evaluator", "scorer")),
    *((source, "learner", "any") for source in ("rollout", "evaluator", "scorer")),
}


def test_the_policies_open_these_ways_and_no_other() -> None:
    objects = tuple(copy.deepcopy(render()))
    policies = of_kind(objects, "NetworkPolicy")
    # Redis' port has one name on its own side and its number on the others'.
    for policy in policies:
        for rule in (*policy["spec"].get("ingress", ()), *policy["spec"].get("egress", ())):
            for each in rule.get("ports", ()):
                each["port"] = {"redis": 6379}.get(each["port"], each["port"])
    ports = (6379, 50051, 9090, "http", "any")
    opened = {
        (source, target, port)
        for source in COMPONENTS
        for target in COMPONENTS
        for port in ports
        if allowed(objects, source, target, port)
    }
    any_port = {(source, target) for source, target, port in WAYS if port == "any"}
    assert {way for way in opened if (way[0], way[1]) not in any_port} == {way for way in WAYS if way[2] != "any"}
    assert {(source, target) for source, target, port in opened if port == "any"} == any_port


@every_values_file
def test_everything_is_denied_first_and_every_pod_is_covered(values: Path) -> None:
    objects = render(values)
    policies = of_kind(objects, "NetworkPolicy")
    if "no-monitoring" in values.name:
        assert not policies
        return
    deny = named(objects, "NetworkPolicy", "jp-jackpot-deny")["spec"]
    assert set(deny) == {"podSelector", "policyTypes"} and deny["policyTypes"] == ["Ingress", "Egress"]
    assert all(selects(deny["podSelector"], labels_of(component)) for component in COMPONENTS)
    assert all(selects(deny["podSelector"], meta["labels"]) for _, meta, _ in pods(objects))
    assert not selects(deny["podSelector"], {"app.kubernetes.io/name": "something-else"})
    # The pods of jobs carry the label by which the policies know this release.
    cluster = named(objects, "ConfigMap", "jp-jackpot-cluster")["data"]["cluster.yaml"]
    assert '"app.kubernetes.io/instance":"jp"' in cluster


def test_prometheus_and_the_ingress_are_let_in_only_where_they_are_used() -> None:
    def peers(objects: tuple[Object, ...], policy: str) -> str:
        return str(named(objects, "NetworkPolicy", f"jp-jackpot-{policy}")["spec"]["ingress"])

    plain, whole = tuple(render()), tuple(render(CHART / "ci" / "gpu-cluster-values.yaml"))
    for policy, namespaces in (("control-plane", ("monitoring", "ingress-nginx")), ("workers", ("monitoring",))):
        for namespace in namespaces:
            assert namespace in peers(whole, policy)
            assert namespace not in peers(plain, policy)
