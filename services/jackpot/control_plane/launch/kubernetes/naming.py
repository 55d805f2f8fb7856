"""Names of a job's objects. They are deterministic, so that creating an object twice creates it once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

ROLES = ("orchestrator", "rollout", "evaluator", "scorer", "learner")
JOB_LABEL = "jackpot/job-id"
INSTANCE_LABEL = "jackpot/instance"
"""Label with the instance number of a rollout replica that joined a running job."""
GRPC_PORT, HEALTH_PORT, METRICS_PORT = 50051, 50052, 9090

# A pod is called <JobSet>-<role>-0-<index>-<5 random>; JobSet requires a DNS label of RFC 1035: at most 63 characters,
# the first a letter.
MAX_NAME = 63 - len("-orchestrator-0-9999-abcde")


def jobset_name(job_id: str) -> str:
    """The JobSet of a job: ``j-`` and its id, or if that is too long, its start and a hash of the whole."""
    name = f"j-{job_id}"
    if len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(job_id.encode()).hexdigest()[:8]
    return f"{name[: MAX_NAME - 9].rstrip('-')}-{digest}"


def joined_name(job_id: str, instance: int) -> str:
    """The Job of a rollout replica that joined. ``-rollout-0`` and the like are names that JobSet gives."""
    return f"{jobset_name(job_id)}-joined-{instance}"


def rollout_job_name(job_id: str) -> str:
    """The Job that JobSet makes for the rollout replicas that a job begins with."""
    return f"{jobset_name(job_id)}-rollout-0"


def host(job_id: str, role: str, index: int = 0) -> str:
    """DNS name of a pod, within its namespace."""
    jobset = jobset_name(job_id)
    return f"{jobset}-{role}-0-{index}.{jobset}"


def labels(job_id: str, role: str | None, extra: Mapping[str, str]) -> dict[str, str]:
    """Labels of a job's objects; ``role`` is None for the JobSet itself."""
    fixed = {"app.kubernetes.io/name": "jackpot", JOB_LABEL: job_id}
    return {**extra, **fixed, **({"app.kubernetes.io/component": role} if role else {})}
