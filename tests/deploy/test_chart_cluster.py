"""What the chart tells the launcher: cluster.yaml, parsed as the launcher parses it."""

from __future__ import annotations

from pathlib import Path

import pytest
from chart_world import CHART, ROOT, VALUES_FILES, Object, named, of_kind, render, values_id

from jackpot.config import load_job
from jackpot.control_plane.launch.kubernetes.jobset import jobset
from jackpot.control_plane.launch.kubernetes.settings import ClusterSettings


def cluster(values: Path | None, directory: Path, *settings: str) -> ClusterSettings:
    """The settings as the control plane reads them."""
    path = directory / "cluster.yaml"
    path.write_text(named(render(values, *settings), "ConfigMap", "jp-jackpot-cluster")["data"]["cluster.yaml"])
    return ClusterSettings.load(path)


@pytest.mark.parametrize("values", VALUES_FILES, ids=values_id)
def test_the_launcher_takes_what_the_chart_writes(values: Path, tmp_path: Path) -> None:
    found = cluster(values, tmp_path)
    objects = render(values)
    assert found.namespace == "ml"
    assert found.service_account in {each["metadata"]["name"] for each in of_kind(objects, "ServiceAccount")}
    assert found.labels["app.kubernetes.io/instance"] == "jp"
    for role in ("orchestrator", "scorer", "learner"):
        assert found.redis.role_url_secrets[role].key == f"{role}-url"


def test_every_setting_arrives(tmp_path: Path) -> None:
    found = cluster(CHART / "ci" / "gpu-cluster-values.yaml", tmp_path)
    assert (found.queue, found.priority_class) == ("training", "batch")
    assert found.image_pull_secrets == ["registry"]
    assert (found.tls_secret, found.tls_peer_name) == ("jp-jackpot-worker-tls", "jackpot-worker")
    assert (found.run_claim, found.model_claim) == ("jp-jackpot-runs", "models")
    assert (found.hf_token_secret.name, found.hf_token_secret.key) == ("huggingface", "token")
    assert found.labels["team"] == "research"
    assert found.annotations == {"k8s.v1.cni.cncf.io/networks": "rdma"}
    learner = found.roles.learner
    assert learner.image == "registry.example.com/ml/jackpot-learner:0.1.0-cuda"
    assert learner.resources["limits"]["nvidia.com/gpu"] == 8
    assert learner.node_selector == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert learner.tolerations == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert (learner.runtime_class, learner.shm_size) == ("nvidia", "64Gi")
    assert learner.env == {"NCCL_IB_HCA": "mlx5", "NCCL_DEBUG": "WARN"}
    assert found.roles.evaluator.image == found.roles.rollout.image
    assert found.roles.orchestrator.image == "registry.example.com/ml/jackpot-orchestrator:0.1.0"


def test_the_bus_url_of_every_role_is_in_the_secret(tmp_path: Path) -> None:
    objects = render()
    found = cluster(None, tmp_path)
    secrets: dict[str, Object] = {each["metadata"]["name"]: each["data"] for each in of_kind(objects, "Secret")}
    for reference in (found.redis.url_secret, *found.redis.role_url_secrets.values()):
        assert reference.key in secrets[reference.name]


def test_the_workers_certificate_carries_the_name_that_they_ask_for(tmp_path: Path) -> None:
    setting = 'tls.workers.peerName="peer.example"'
    found = cluster(None, tmp_path, setting)
    certificate = named(render(None, setting), "Certificate", found.tls_secret)
    assert certificate["spec"]["dnsNames"] == [found.tls_peer_name] == ["peer.example"]


def test_numbers_that_are_names_stay_names(tmp_path: Path) -> None:
    found = cluster(None, tmp_path, 'workers.queue="13"', 'storage.runs.existingClaim="9"', 'image.pullSecrets=["17"]')
    assert (found.queue, found.run_claim, found.image_pull_secrets) == ("13", "9", ["17"])


def pods_of_a_job(found: ClusterSettings) -> dict[str, tuple[Object, Object]]:
    """Metadata and spec of each role's pods, as the launcher makes them."""
    manifest = jobset("qwen3-8b-1123-094051-1a2b", load_job(ROOT / "examples" / "qwen3_8b.yaml"), found)
    templates = {each["name"]: each["template"]["spec"]["template"] for each in manifest["spec"]["replicatedJobs"]}
    return {role: (template["metadata"], template["spec"]) for role, template in templates.items()}


def test_the_launchers_pods_are_those_that_policies_monitors_and_secrets_await(tmp_path: Path) -> None:
    values = CHART / "ci" / "gpu-cluster-values.yaml"
    objects = render(values)
    made = {each["metadata"]["name"] for each in of_kind(objects, "Secret", "PersistentVolumeClaim", "ServiceAccount")}
    made |= {each["spec"]["secretName"] for each in of_kind(objects, "Certificate")}
    made |= {"models", "huggingface", "registry"}  # named by the values
    monitor = named(objects, "PodMonitor", "jp-jackpot-workers")["spec"]
    deny = named(objects, "NetworkPolicy", "jp-jackpot-deny")["spec"]["podSelector"]["matchLabels"]
    pods = pods_of_a_job(cluster(values, tmp_path))
    assert set(pods) == set(monitor["selector"]["matchExpressions"][0]["values"])
    for role, (metadata, spec) in pods.items():
        labels = metadata["labels"]
        assert deny.items() <= labels.items() and labels["app.kubernetes.io/component"] == role
        assert monitor["selector"]["matchLabels"].items() <= labels.items()
        (container,) = spec["containers"]
        ports = {each["name"]: each["containerPort"] for each in container["ports"]}
        assert ports[monitor["podMetricsEndpoints"][0]["port"]] == 9090
        used = {spec["serviceAccountName"], *(each["name"] for each in spec["imagePullSecrets"])}
        for volume in spec["volumes"]:
            used |= {volume["secret"]["secretName"]} if "secret" in volume else set()
            used |= {volume["persistentVolumeClaim"]["claimName"]} if "persistentVolumeClaim" in volume else set()
        for variable in container["env"]:
            reference = variable.get("valueFrom", {}).get("secretKeyRef")
            used |= {reference["name"]} if reference else set()
            if variable["name"] == "JACKPOT_REDIS_URL":
                assert reference["key"] == f"{role}-url"
        assert used <= made, role


def test_the_launchers_pods_meet_the_restricted_standard(tmp_path: Path) -> None:
    for role, (_, spec) in pods_of_a_job(cluster(None, tmp_path)).items():
        assert spec["automountServiceAccountToken"] is False, role
        assert spec["securityContext"]["runAsNonRoot"] is True, role
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, role
        for container in spec["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, role
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, role
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, role


def test_a_bucket_reaches_every_pod_that_uses_it(tmp_path: Path) -> None:
    values = CHART / "ci" / "external-redis-tls-values.yaml"
    found = cluster(values, tmp_path).object_store
    assert found is not None and found.secret == "jackpot-s3" and found.scratch_size == "100Gi"
    assert found.env == {"AWS_ENDPOINT_URL": "https://s3.example.com", "AWS_DEFAULT_REGION": "eu-central-1"}
    objects = render(values)
    (deployment,) = of_kind(objects, "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert "--weight-store=s3://jackpot/runs" in container["args"]
    assert container["envFrom"] == [{"secretRef": {"name": "jackpot-s3"}}]
    told = {one["name"]: one.get("value") for one in container["env"]}
    assert found.env.items() <= told.items()
    (rule,) = named(objects, "NetworkPolicy", "jp-jackpot-objects")["spec"]["egress"]
    assert rule == {"to": [{"ipBlock": {"cidr": "10.30.0.0/16"}}], "ports": [{"port": 443, "protocol": "TCP"}]}

    without = render()
    assert cluster(None, tmp_path).object_store is None
    (container,) = of_kind(without, "Deployment")[0]["spec"]["template"]["spec"]["containers"]
    assert "envFrom" not in container and not [one for one in container["args"] if "weight-store" in one]
    assert not [one for one in of_kind(without, "NetworkPolicy") if one["metadata"]["name"].endswith("-objects")]
