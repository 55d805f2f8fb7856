"""The JobSet of a job: against files that a person has read, Kubernetes' schemas, and the fields that JobSet has."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate import validate
from kubernetes_world import CLUSTER

from jackpot.config import JobSpec, parse_job
from jackpot.config.environment import ServiceEnvironment
from jackpot.control_plane.launch.kubernetes.jobset import jobset, joining_rollout, variables
from jackpot.control_plane.launch.kubernetes.naming import MAX_NAME, ROLES, jobset_name
from jackpot.control_plane.launch.kubernetes.settings import ClusterSettings
from jackpot.control_plane.launch.kubernetes.status import Phase, Status
from jackpot.errors import ConfigError

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = ("1.30", "1.31", "1.32", "1.33", "1.34", "1.35", "1.36")

GPU_CLUSTER = CLUSTER | {
    "queue": "training",
    "priority_class": "research",
    "image_pull_secrets": [{"name": "registry"}, "other"],
    "tls_secret": "jackpot-worker-tls",
    "model_claim": "jackpot-models",
    "hf_token_secret": {"name": "hf", "key": "token"},
    "object_store": {"secret": "s3", "env": {"AWS_ENDPOINT_URL": "https://s3.example"}, "scratch_size": "50Gi"},
    "redis": CLUSTER["redis"] | {"role_url_secrets": {"scorer": {"name": "jackpot-redis", "key": "scorer-url"}}},
    "labels": {"team": "research"},
    "annotations": {"example.org/cost": "rl"},
    "roles": CLUSTER["roles"]
    | {
        role: {
            "image": f"registry.example/jackpot-{role}@sha256:{'0' * 64}",
            "resources": {"requests": {"cpu": "8"}, "limits": {"nvidia.com/gpu": gpus}},
            "node_selector": {"gpu": "h100"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "runtime_class": "nvidia",
            "env": {"NCCL_DEBUG": "WARN"},
            "shm_size": "16Gi",
        }
        for role, gpus in (("rollout", 1), ("learner", 8))
    },
}
JOBS: dict[str, dict[str, Any]] = {
    "small": {},
    "large": {"rollout": {"replicas": 4}, "scorer": {"replicas": 2}, "run": {"max_restarts": 7}},
    "unscored": {"scorer": {"reuse_reference": True}},
}
CLUSTERS = {"plain": CLUSTER, "gpu": GPU_CLUSTER}
CASES = list(itertools.product(JOBS, CLUSTERS))
GOLDEN_CASES = [case for case in CASES if case[0] != "unscored"]


def job_spec(job: str) -> JobSpec:
    content = {
        "name": "chain-sum",
        "policy": {"model": "/var/lib/jackpot/models/policy"},
        "actor": {"model": "/var/lib/jackpot/models/actor"},
        "task": {"name": "complement"},
    }
    return parse_job(content | JOBS[job])


def manifest(job: str, cluster: str) -> dict[str, Any]:
    return jobset("chain-sum-1123-1", job_spec(job), ClusterSettings.model_validate(CLUSTERS[cluster]))


def joining(cluster: str) -> dict[str, Any]:
    settings = ClusterSettings.model_validate(CLUSTERS[cluster])
    return joining_rollout("chain-sum-1123-1", job_spec("large"), settings, 4, "0c9a")


@pytest.mark.parametrize(("job", "cluster"), GOLDEN_CASES)
def test_it_is_what_the_file_says(job: str, cluster: str) -> None:
    """A change of the JobSet shows as a change of these files: JACKPOT_REGENERATE=1 pytest writes them anew."""
    compare(GOLDEN / f"jobset-{job}-{cluster}.yaml", manifest(job, cluster))


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_where_no_scorer_runs_its_role_alone_is_left_out(cluster: str) -> None:
    made, other = manifest("unscored", cluster), manifest("small", cluster)
    jobs = [one for one in other["spec"]["replicatedJobs"] if one["name"] != "scorer"]
    assert made == other | {"spec": other["spec"] | {"replicatedJobs": jobs}}


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_replica_that_joins_is_what_the_file_says(cluster: str) -> None:
    compare(GOLDEN / f"joining-{cluster}.yaml", joining(cluster))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_replica_that_joins_is_a_job_that_kubernetes_takes(cluster: str, version: str) -> None:
    validate(joining(cluster), version, strict=True)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_replica_that_joins_is_like_the_others_but_for_its_address(cluster: str) -> None:
    own = next(one for one in manifest("large", cluster)["spec"]["replicatedJobs"] if one["name"] == "rollout")
    pods = [own["template"]["spec"]["template"], joining(cluster)["spec"]["template"]]
    container, joined = (pod["spec"]["containers"][0] for pod in pods)
    added = {"JACKPOT_INSTANCE", "POD_IP", "JACKPOT_ADVERTISE_ADDRESS"}
    assert {k: v for k, v in joined.items() if k != "env"} == {k: v for k, v in container.items() if k != "env"}
    assert [one for one in joined["env"] if one["name"] not in added] == [
        one for one in container["env"] if one["name"] != "JACKPOT_INSTANCE"
    ]
    told = {one["name"]: one.get("value") for one in joined["env"]}
    assert told["JACKPOT_INSTANCE"] == "4" and told["JACKPOT_ADVERTISE_ADDRESS"] == "$(POD_IP):50051"
    names = [one["name"] for one in joined["env"]]
    assert names.index("POD_IP") < names.index("JACKPOT_ADVERTISE_ADDRESS"), "only what stands before is put in"
    labels = pods[1]["metadata"]["labels"]
    assert labels == pods[0]["metadata"]["labels"] | {"jackpot/instance": "4"}


def compare(path: Path, made: dict[str, Any]) -> None:
    text = yaml.safe_dump(made, sort_keys=False, width=120)
    if os.environ.get("JACKPOT_REGENERATE"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("job", "cluster"), CASES)
def test_every_job_in_it_is_one_that_kubernetes_takes(job: str, cluster: str, version: str) -> None:
    for replicated in manifest(job, cluster)["spec"]["replicatedJobs"]:
        child = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}}
        validate(child | {"spec": replicated["template"]["spec"]}, version, strict=True)


@pytest.mark.parametrize(("job", "cluster"), CASES)
def test_jobset_knows_every_field(job: str, cluster: str) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    made = manifest(job, cluster)["spec"]
    read = models.JobsetV1alpha2JobSetSpec.from_dict(made)
    kept = read.to_dict()
    for name in ("network", "successPolicy", "failurePolicy", "suspend", "ttlSecondsAfterFinished"):
        assert kept.get(name) == made.get(name), name
    left_out = {"scorer"} if job == "unscored" else set()
    assert [one["name"] for one in kept["replicatedJobs"]] == [role for role in ROLES if role not in left_out]


@pytest.mark.parametrize(("job", "cluster"), CASES)
def test_every_process_reads_its_variables_and_finds_the_others(job: str, cluster: str) -> None:
    made = manifest(job, cluster)
    name = made["metadata"]["name"]
    for replicated in made["spec"]["replicatedJobs"]:
        (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
        told = {one["name"]: one.get("value", "0") for one in container["env"] if one["name"].startswith("JACKPOT_")}
        environment = ServiceEnvironment.from_env(told)
        assert environment.job_id == "chain-sum-1123-1"
        assert environment.run_dir == Path("/var/lib/jackpot/runs/chain-sum-1123-1")
        if replicated["name"] == "orchestrator":
            count = JOBS[job].get("rollout", {}).get("replicas", 1)
            hosts = tuple(f"{name}-rollout-0-{index}.{name}:50051" for index in range(count))
            assert environment.rollout_addresses == hosts
            assert environment.evaluator_address == f"{name}-evaluator-0-0.{name}:50051"
        else:
            served = replicated["name"] in ("rollout", "evaluator", "scorer")
            assert environment.listen == ("0.0.0.0:50051" if served else "")
        assert bool(environment.tls_dir) == (cluster == "gpu")


@pytest.mark.parametrize("transport", ["store", "nccl"])
def test_a_learner_that_broadcasts_is_told_where_the_replicas_are(transport: str) -> None:
    content = {
        "policy": {"model": "/models/policy"},
        "actor": {"model": "/models/actor"},
        "task": {"name": "complement"},
        "rollout": {"replicas": 2},
        "weights": {"transport": transport},
    }
    made = variables("learner", "chain-sum-1123-1", parse_job(content), ClusterSettings.model_validate(CLUSTER))
    addresses = ServiceEnvironment.from_env(made).rollout_addresses
    assert len(addresses) == (2 if transport == "nccl" else 0)


@pytest.mark.parametrize(("job", "cluster"), CASES)
def test_every_pod_fits_a_restricted_namespace(job: str, cluster: str) -> None:
    for replicated in manifest(job, cluster)["spec"]["replicatedJobs"]:
        pod = replicated["template"]["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
        assert all(set(volume) & {"emptyDir", "persistentVolumeClaim", "secret"} for volume in pod["volumes"])


def test_names_fit_into_host_names() -> None:
    assert jobset_name("7b-1") == "j-7b-1"
    long = "a" * 40 + "-" + "b" * 22
    name = jobset_name(long)
    assert len(name) <= MAX_NAME and name != jobset_name(long[:-1] + "c")
    assert len(f"{name}-orchestrator-0-9999-abcde") <= 63


ready = {"replicatedJobsStatus": [{"name": "learner", "ready": 1}]}
up = {"replicatedJobsStatus": [{"name": "rollout", "ready": 1}, {"name": "learner", "ready": 0, "active": 1}]}


@pytest.mark.parametrize(
    ("jobset_object", "phase"),
    [
        ({}, Phase.STARTING),
        ({"spec": {"suspend": True}}, Phase.WAITING),
        ({"status": up}, Phase.STARTING),
        ({"status": ready}, Phase.RUNNING),
        ({"status": {"replicatedJobsStatus": [{"name": "orchestrator", "succeeded": 1}]}}, Phase.RUNNING),
        ({"status": {"conditions": [{"type": "Suspended", "status": "True"}]}}, Phase.WAITING),
        ({"status": ready | {"conditions": [{"type": "Suspended", "status": "False"}]}}, Phase.RUNNING),
        ({"status": {"conditions": [{"type": "Completed", "status": "True"}]}}, Phase.COMPLETED),
        (
            {"status": {"conditions": [{"type": "Failed", "status": "True", "reason": "R", "message": "m"}]}},
            Phase.FAILED,
        ),
    ],
)
def test_what_a_status_means(jobset_object: dict[str, Any], phase: Phase) -> None:
    status = Status.of(jobset_object)
    assert status.phase is phase
    assert status.message == ("R: m" if phase is Phase.FAILED else "")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"nodes": 3}, "nodes"),
        ({"namespace": "Not A Name"}, "namespace"),
        ({"roles": {**CLUSTER["roles"], "learner": {"image": "x", "gpus": 2}}}, r"roles\.learner\.gpus"),
        ({"run_claim": None}, "run_claim"),
    ],
)
def test_settings_that_cannot_work_are_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(CLUSTER | change), encoding="utf-8")
    with pytest.raises(ConfigError, match=named):
        ClusterSettings.load(path)
