"""The pods of a job: container, volumes, probes, and what the "restricted" pod security standard requires."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jackpot.config import JobSpec
from jackpot.control_plane.launch.kubernetes.naming import GRPC_PORT, HEALTH_PORT, INSTANCE_LABEL, METRICS_PORT, labels
from jackpot.control_plane.launch.kubernetes.settings import (
    DATA_DIR,
    SCRATCH_DIR,
    TLS_DIR,
    ClusterSettings,
    RoleSettings,
)
from jackpot.process.children import HASH_SEED

Manifest = dict[str, Any]

USER = 10001
GRACE_SECONDS = 60  # a SIGTERM asks a service to finish its unit of work
PROBE_SECONDS = 10


def pod_template(
    role: str,
    job_id: str,
    variables: Mapping[str, str],
    job: JobSpec,
    cluster: ClusterSettings,
    instance: int | None = None,
) -> Manifest:
    """The pod template of a role.

    Args:
        role: a role.
        job_id: the job's id.
        variables: the container's JACKPOT_* variables.
        job: the job as resolved.
        cluster: the cluster's settings.
        instance: the number of a rollout replica that joins a running job; None for the job's initial pods.
    """
    settings: RoleSettings = getattr(cluster.roles, role)
    spec: Manifest = {
        "restartPolicy": "Never",  # its Job replaces the pod; otherwise exit codes would not count
        "serviceAccountName": cluster.service_account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # their variables JACKPOT_… would be read as settings
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(role, variables, job, cluster, settings, instance)],
        "volumes": _volumes(settings, cluster),
    }
    optional = {
        "imagePullSecrets": [
            secret if isinstance(secret, dict) else {"name": secret} for secret in cluster.image_pull_secrets
        ],
        "nodeSelector": settings.node_selector,
        "tolerations": settings.tolerations,
        "affinity": settings.affinity,
        "runtimeClassName": settings.runtime_class,
        "priorityClassName": cluster.priority_class if cluster.queue is None else None,
    }
    spec |= {name: value for name, value in optional.items() if value}
    metadata: Manifest = {"labels": labels(job_id, role, cluster.labels)}
    if instance is not None:
        metadata["labels"][INSTANCE_LABEL] = str(instance)
    if cluster.annotations:
        metadata["annotations"] = dict(cluster.annotations)
    return {"metadata": metadata, "spec": spec}


def _container(
    role: str,
    variables: Mapping[str, str],
    job: JobSpec,
    cluster: ClusterSettings,
    settings: RoleSettings,
    instance: int | None,
) -> Manifest:
    service = "rollout" if role == "evaluator" else role
    container: Manifest = {
        "name": role,
        "image": settings.image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["python", "-m", f"jackpot.{service}"],
        "env": _environment(role, variables, cluster, settings, instance),
        "ports": [{"name": "metrics", "containerPort": METRICS_PORT}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": _mounts(cluster),
    }
    if cluster.object_store is not None and cluster.object_store.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": cluster.object_store.secret}}]
    if settings.resources:
        container["resources"] = dict(settings.resources)
    if service in ("rollout", "scorer"):
        container["ports"] += [
            {"name": "grpc", "containerPort": GRPC_PORT},
            {"name": "health", "containerPort": HEALTH_PORT},
        ]
        container |= _probes(job)
    return container


def _probes(job: JobSpec) -> Manifest:
    """The startup probe allows for the minutes that a large model takes to load; the liveness probe starts after it."""
    patience = max(1, round(job.run.startup_timeout_seconds / PROBE_SECONDS))

    def probe(service: str, failures: int) -> Manifest:
        check = {"port": HEALTH_PORT, "service": service}
        return {"grpc": check, "periodSeconds": PROBE_SECONDS, "timeoutSeconds": 5, "failureThreshold": failures}

    return {
        "startupProbe": probe("liveness", patience),
        "readinessProbe": probe("readiness", 3),
        "livenessProbe": probe("liveness", 6),
    }


def _environment(
    role: str,
    variables: Mapping[str, str],
    cluster: ClusterSettings,
    settings: RoleSettings,
    instance: int | None,
) -> list[Manifest]:
    fixed = {
        "HOME": "/tmp",
        "XDG_CACHE_HOME": "/tmp/cache",
        "HF_HOME": f"{DATA_DIR}/models" if cluster.model_claim else "/tmp/hf",
        "HF_HUB_OFFLINE": "1",
    } | HASH_SEED
    objects = cluster.object_store.env if cluster.object_store is not None else {}
    if cluster.hf_token_secret is not None:
        del fixed["HF_HUB_OFFLINE"]
    entries: list[Manifest] = [
        {"name": name, "value": value} for name, value in {**fixed, **variables, **objects, **settings.env}.items()
    ]
    if instance is not None:
        entries += [
            {"name": "JACKPOT_INSTANCE", "value": str(instance)},
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "JACKPOT_ADVERTISE_ADDRESS", "value": f"$(POD_IP):{GRPC_PORT}"},
        ]
    elif role in ("rollout", "scorer"):
        index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
        entries.append({"name": "JACKPOT_INSTANCE", "valueFrom": {"fieldRef": index}})
    if role in ("orchestrator", "scorer", "learner"):
        secret = cluster.redis.role_url_secrets.get(role, cluster.redis.url_secret)  # type: ignore[call-overload]
        entries.append(_secret("JACKPOT_REDIS_URL", secret.name, secret.key))
    if cluster.hf_token_secret is not None:
        entries.append(_secret("HF_TOKEN", cluster.hf_token_secret.name, cluster.hf_token_secret.key))
    return entries


def _secret(variable: str, name: str, key: str) -> Manifest:
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}}


def _volumes(settings: RoleSettings, cluster: ClusterSettings) -> list[Manifest]:
    volumes: list[Manifest] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shm_size}},
        {"name": "runs", "persistentVolumeClaim": {"claimName": cluster.run_claim}},
    ]
    if cluster.model_claim is not None:
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": cluster.model_claim}})
    if cluster.object_store is not None:
        volumes.append({"name": "scratch", "emptyDir": {"sizeLimit": cluster.object_store.scratch_size}})
    if cluster.tls_secret is not None:
        volumes.append({"name": "tls", "secret": {"secretName": cluster.tls_secret, "defaultMode": 0o440}})
    return volumes


def _mounts(cluster: ClusterSettings) -> list[Manifest]:
    mounts: list[Manifest] = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "runs", "mountPath": f"{DATA_DIR}/runs"},
    ]
    if cluster.model_claim is not None:
        mounts.append({"name": "models", "mountPath": f"{DATA_DIR}/models"})
    if cluster.object_store is not None:
        mounts.append({"name": "scratch", "mountPath": SCRATCH_DIR})
    if cluster.tls_secret is not None:
        mounts.append({"name": "tls", "mountPath": TLS_DIR, "readOnly": True})
    return mounts
