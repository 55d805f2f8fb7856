"""How jobs run on a cluster: the file that the chart renders (``cluster.yaml``), parsed once, strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from jackpot.errors import ConfigError
from jackpot.section import PositiveFloat, Section

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]

TLS_DIR = "/etc/jackpot/tls"
DATA_DIR = "/var/lib/jackpot"
SCRATCH_DIR = f"{DATA_DIR}/scratch"


class SecretKey(Section):
    """A value in a Secret."""

    name: Name
    """The Secret."""
    key: str
    """The key in it."""


class RedisSettings(Section):
    """Where the bus is."""

    url_secret: SecretKey
    """The URL, password included, that services connect to."""
    role_url_secrets: dict[Literal["orchestrator", "scorer", "learner"], SecretKey] = Field(default_factory=dict)
    """URLs with separate users, by role; a role without one uses ``url_secret``."""


class ObjectStoreSettings(Section):
    """How pods reach the object store that holds the weights and checkpoints of jobs (``weights.store``)."""

    secret: Name | None = None
    """Secret whose keys are variables, ``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY``; null leaves credentials to
    the service account's role."""
    env: dict[str, str] = Field(default_factory=dict)
    """Further variables, such as ``AWS_ENDPOINT_URL`` and ``AWS_DEFAULT_REGION``."""
    scratch_size: str = "100Gi"
    """Space on the node for copies: a few versions of the weights, and in the learner one checkpoint."""


class RoleSettings(Section):
    """Pods of one role."""

    image: str
    """Image, with its tag or digest."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When it is pulled."""
    resources: dict[str, Any] = Field(default_factory=dict)
    """``requests`` and ``limits`` of the container; GPUs as ``nvidia.com/gpu`` under ``limits``."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that a node must have."""
    tolerations: list[dict[str, Any]] = Field(default_factory=list)
    """Taints that are tolerated."""
    affinity: dict[str, Any] = Field(default_factory=dict)
    """Affinity of the pods."""
    runtime_class: Name | None = None
    """``runtimeClassName``, such as ``nvidia``."""
    env: dict[str, str] = Field(default_factory=dict)
    """Further variables of the container."""
    shm_size: str = "1Gi"
    """Size of /dev/shm, which NCCL and vLLM use between processes."""


class Roles(Section):
    """Pods by role."""

    orchestrator: RoleSettings
    """Prompts and rewards."""
    rollout: RoleSettings
    """The actor."""
    evaluator: RoleSettings
    """The policy, sampled for evaluation."""
    scorer: RoleSettings
    """The target policy's log-probabilities."""
    learner: RoleSettings
    """Training."""


class ClusterSettings(Section):
    """Everything about the cluster that is not in a job file."""

    namespace: Name
    """Where the JobSets are made."""
    service_account: Name = "jackpot-worker"
    """Service account of the pods; they get no token of it."""
    queue: Name | None = None
    """Kueue's LocalQueue. With one, jobs are created suspended, and Kueue admits them."""
    priority_class: Name | None = None
    """Kueue's WorkloadPriorityClass with a queue; without one the pods' PriorityClass."""
    image_pull_secrets: list[Name | dict[str, str]] = Field(default_factory=list)
    """Secrets for the registry: names, or ``{name: …}``."""
    redis: RedisSettings
    """The bus."""
    tls_secret: Name | None = None
    """Secret with ca.crt, tls.crt, tls.key for TLS between services and to Redis; null is plaintext, which services
    refuse on anything but loopback."""
    tls_peer_name: str = "jackpot"
    """DNS name that every service's certificate carries."""
    run_claim: Name
    """PersistentVolumeClaim (ReadWriteMany) with the run directories; the control plane mounts it, too."""
    model_claim: Name | None = None
    """PersistentVolumeClaim with models, mounted at /var/lib/jackpot/models."""
    object_store: ObjectStoreSettings | None = None
    """The object store of jobs that name one; null mounts nothing for it."""
    hf_token_secret: SecretKey | None = None
    """Token for the Hugging Face hub."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Further labels of every object."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Further annotations of every pod."""
    keep_seconds: PositiveFloat = 86400.0
    """How long Kubernetes keeps a finished JobSet that the control plane did not remove, because it was down."""
    roles: Roles
    """Pods by role."""

    @classmethod
    def load(cls, path: Path) -> ClusterSettings:
        """Read a file.

        Raises:
            ConfigError: naming what is wrong with it.
        """
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError("--cluster", str(path), f"cannot be read ({error})", "The chart renders one.") from None
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "--cluster"
            remedy = f"Correct it in {path}, or the chart's values behind it."
            raise ConfigError(field, first.get("input"), first["msg"].lower(), remedy) from None
