"""A job as a JobSet (``jobset.x-k8s.io/v1alpha2``). A pure function: job and settings in, manifest out."""

from __future__ import annotations

from typing import Any

from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment
from jackpot.control_plane.launch.kubernetes.naming import (
    GRPC_PORT,
    HEALTH_PORT,
    INSTANCE_LABEL,
    METRICS_PORT,
    ROLES,
    host,
    jobset_name,
    joined_name,
    labels,
)
from jackpot.control_plane.launch.kubernetes.pod import pod_template
from jackpot.control_plane.launch.kubernetes.settings import DATA_DIR, SCRATCH_DIR, TLS_DIR, ClusterSettings
from jackpot.trajectory import Role

Manifest = dict[str, Any]

API_VERSION = "jobset.x-k8s.io/v1alpha2"
MUST_FINISH = ("learner", "orchestrator")

FINAL_EXIT_CODES = (2, 70, 78)
"""Exit codes after which a restart cannot help: configuration that cannot work, and alarms that stop a job."""

ENDLESS = 10_000  # services that others only call are restarted without limit


def replicas(job: JobSpec) -> dict[str, int]:
    """Pods of each role."""
    return {
        "orchestrator": 1,
        "rollout": job.rollout.replicas,
        "evaluator": 1,
        "scorer": job.scorer_replicas,
        "learner": 1,
    }


def jobset(job_id: str, job: JobSpec, cluster: ClusterSettings) -> Manifest:
    """The JobSet of a job.

    Args:
        job_id: the job's id.
        job: the job as resolved; its model paths lie on the volumes.
        cluster: the cluster's settings.
    """
    counts = replicas(job)
    metadata: Manifest = {
        "name": jobset_name(job_id),
        "namespace": cluster.namespace,
        "labels": labels(job_id, None, cluster.labels),
        "annotations": {"jackpot/job-name": job.name},
    }
    spec: Manifest = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "successPolicy": {"operator": "All", "targetReplicatedJobs": list(MUST_FINISH)},
        "failurePolicy": {
            "maxRestarts": 0,
            "rules": [
                {"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
            ],
        },
        "ttlSecondsAfterFinished": int(cluster.keep_seconds),
        "replicatedJobs": [_replicated_job(role, counts[role], job_id, job, cluster) for role in ROLES if counts[role]],
    }
    if cluster.queue is not None:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = cluster.queue
        if cluster.priority_class is not None:
            metadata["labels"]["kueue.x-k8s.io/priority-class"] = cluster.priority_class
        spec["suspend"] = True  # until Kueue admits it
    return {"apiVersion": API_VERSION, "kind": "JobSet", "metadata": metadata, "spec": spec}


def _replicated_job(role: str, count: int, job_id: str, job: JobSpec, cluster: ClusterSettings) -> Manifest:
    """Pods are replaced one by one, so that losing one affects no other."""
    restarts = job.run.max_restarts if role in MUST_FINISH else ENDLESS
    spec: Manifest = {
        "completionMode": "Indexed",
        "completions": count,
        "parallelism": count,
        **_recovery(role, restarts),
        "template": pod_template(role, job_id, variables(role, job_id, job, cluster), job, cluster),
    }
    template = {"metadata": {"labels": labels(job_id, role, cluster.labels)}, "spec": spec}
    return {"name": role, "replicas": 1, "template": template}


def _recovery(role: str, restarts: int) -> Manifest:
    return {
        "backoffLimit": restarts,
        "podReplacementPolicy": "Failed",  # never two learners at a time
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": role, "operator": "In", "values": list(FINAL_EXIT_CODES)},
                },
            ]
        },
    }


def joining_rollout(job_id: str, job: JobSpec, cluster: ClusterSettings, instance: int, owner_uid: str) -> Manifest:
    """The Job (``batch/v1``) of a rollout replica that joins a running job.

    The JobSet owns it, and it is deleted with it, but it is not part of the gang: it queues for room by itself, and its
    failure does not fail the job.

    Args:
        job_id: the job's id.
        job: the job as resolved.
        cluster: the cluster's settings.
        instance: the replica's number, from ``rollout.replicas`` on.
        owner_uid: of the JobSet.
    """
    metadata: Manifest = {
        "name": joined_name(job_id, instance),
        "namespace": cluster.namespace,
        "labels": {**labels(job_id, "rollout", cluster.labels), INSTANCE_LABEL: str(instance)},
        "ownerReferences": [
            {
                "apiVersion": API_VERSION,
                "kind": "JobSet",
                "name": jobset_name(job_id),
                "uid": owner_uid,
                "blockOwnerDeletion": False,  # true would need a right to the JobSet's finalizers
            }
        ],
    }
    template = pod_template(
        "rollout", job_id, variables("rollout", job_id, job, cluster), job, cluster, instance=instance
    )
    spec: Manifest = {"completions": 1, "parallelism": 1, **_recovery("rollout", ENDLESS), "template": template}
    if cluster.queue is not None:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = cluster.queue
        if cluster.priority_class is not None:
            metadata["labels"]["kueue.x-k8s.io/priority-class"] = cluster.priority_class
        spec["suspend"] = True
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def variables(role: str, job_id: str, job: JobSpec, cluster: ClusterSettings) -> dict[str, str]:
    """The variables of a role's process. Kubernetes adds its instance, the number among pods of this role."""
    serves = role in ("rollout", "evaluator", "scorer")
    model_role: Role = "policy" if role == "evaluator" else job.rollout_role
    orchestrates = role == "orchestrator"
    broadcasts = role == "learner" and job.weights.transport != "store"
    environment = ServiceEnvironment(
        run_dir=f"{DATA_DIR}/runs/{job_id}",  # type: ignore[arg-type]
        job_id=job_id,
        instance="evaluator" if role == "evaluator" else "0",
        listen=f"0.0.0.0:{GRPC_PORT}" if serves else "",
        health_listen=f"0.0.0.0:{HEALTH_PORT}" if serves else "",
        tls_dir=TLS_DIR if cluster.tls_secret else "",
        tls_peer_name=cluster.tls_peer_name if cluster.tls_secret else "",
        role=model_role if role in ("rollout", "evaluator") else "actor",
        rollout_addresses=tuple(
            f"{host(job_id, 'rollout', index)}:{GRPC_PORT}" for index in range(job.rollout.replicas)
        )
        if orchestrates or broadcasts
        else (),
        evaluator_address=f"{host(job_id, 'evaluator')}:{GRPC_PORT}" if orchestrates else "",
        metrics_address=f"0.0.0.0:{METRICS_PORT}",
        scratch_dir=SCRATCH_DIR if cluster.object_store else "",
    )
    given = environment.to_env()
    told = {name: value for name, value in given.items() if value and name != "JACKPOT_REDIS_URL"}
    if role in ("rollout", "scorer"):
        del told["JACKPOT_INSTANCE"]  # the pod's index
    return told


def command(role: str) -> list[str]:
    """The container's command."""
    service = "rollout" if role == "evaluator" else role
    return ["python", "-m", f"jackpot.{service}"]
