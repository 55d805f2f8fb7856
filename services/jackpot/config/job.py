"""The job file, whole: one frozen, strict model per section (in the modules beside this one). The docstring under a
field is its documentation and its JSON Schema description; every default is written with its reason."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from jackpot.config.algorithm import AlgorithmConfig
from jackpot.config.learner import LearnerConfig
from jackpot.config.models import ActorConfig, ModelConfig
from jackpot.config.run import AlarmsConfig, RunConfig, TrackingConfig
from jackpot.config.sampling import EvaluationConfig, SamplingConfig, TaskConfig
from jackpot.config.service_sections import (
    BusConfig,
    OrchestratorConfig,
    RolloutConfig,
    ScorerConfig,
    WeightStoreConfig,
)
from jackpot.config.vllm import OTHER_TEMPERATURE, temperature_problem
from jackpot.section import Number, Section


class JobSpec(Section):
    """A whole training job: the input of `jackpot run`, and of the REST API as JSON."""

    name: str = Field(default="job", pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")
    """Start of the job id: lower-case letters, digits and hyphens, at most 40."""
    seed: Annotated[int, Field(ge=0, lt=2**63), Number] = 0
    """Seeds prompts, sampling, masks and training."""
    policy: ModelConfig
    """The model that is trained."""
    actor: Literal["policy"] | ActorConfig
    """The model that samples; ``policy`` is on-policy training."""
    task: TaskConfig
    """Prompts and rewards."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling of training trajectories."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """The objective."""
    rollout: RolloutConfig = RolloutConfig()
    """Rollout service."""
    scorer: ScorerConfig = ScorerConfig()
    """OBRS scoring service."""
    learner: LearnerConfig = LearnerConfig()
    """Learner service."""
    orchestrator: OrchestratorConfig = OrchestratorConfig()
    """Dispatch."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation."""
    bus: BusConfig = BusConfig()
    """Trajectory bus."""
    weights: WeightStoreConfig = WeightStoreConfig()
    """Weight store."""
    alarms: AlarmsConfig = AlarmsConfig()
    """Alarms."""
    tracking: TrackingConfig = TrackingConfig()
    """Experiment trackers."""
    run: RunConfig = RunConfig()
    """Local run."""

    @model_validator(mode="after")
    def _number_formats_train(self) -> JobSpec:
        learning = [("policy", self.policy)]
        if not isinstance(self.actor, str) and self.actor.train:
            learning.append(("actor", self.actor))
        for name, model in learning:
            if model.dtype == "float16":
                raise ValueError(
                    f"{name}.dtype = 'float16' cannot be trained: gradients this small vanish in it. Set it to bfloat16"
                )
        return self

    @model_validator(mode="after")
    def _actor_fits(self) -> JobSpec:
        actor = self.actor
        if isinstance(actor, str):
            return self
        if actor.weights == "policy" and (actor.train or actor.model != self.policy.model):
            raise ValueError(
                "actor.weights = 'policy' makes the actor the policy itself in another number format. "
                "Set actor.model to policy.model and actor.train to false, or actor.weights to 'own'"
            )
        if actor.weights == "policy" and actor.context_length != self.policy.context_length:
            raise ValueError(
                f"actor.context_length = {actor.context_length} is not policy.context_length = "
                f"{self.policy.context_length}, and the actor is the policy. Write the same for both"
            )
        if actor.quantization and actor.dtype == "float32":
            raise ValueError(
                f"actor.quantization = {actor.quantization!r} computes in 16 bits. Set actor.dtype to bfloat16"
            )
        cheap = "quantization" if actor.quantization else "kv_cache_dtype" if actor.kv_cache_dtype != "auto" else None
        if cheap and self.rollout.engine == "transformers":
            raise ValueError(
                f"actor.{cheap} = {getattr(actor, cheap)!r} is beyond the transformers engine. "
                "Set rollout.engine to vllm, or use actor.dtype"
            )
        return self

    @model_validator(mode="after")
    def _reference_can_be_reused(self) -> JobSpec:
        if not self.scorer.reuse_reference:
            return self
        obrs = self.algorithm.correction.obrs
        problem = None
        if self.learner.updates_per_batch > 1:
            problem = (
                f"learner.updates_per_batch = {self.learner.updates_per_batch}: later updates need an old reference"
            )
        elif obrs and obrs.target == "policy":
            problem = "algorithm.correction.target = 'policy' never uses the scorer's scores"
        elif obrs and obrs.needs_actor_forward:
            problem = f"algorithm.correction.normalizer = {obrs.normalizer!r} needs the actor's forward pass"
        if problem is not None:
            raise ValueError(f"scorer.reuse_reference = true cannot be with {problem}. Leave reuse_reference out")
        return self

    @model_validator(mode="after")
    def _reference_has_an_age(self) -> JobSpec:
        age, greatest = self.scorer.reference_age, self.orchestrator.max_staleness // self.learner.updates_per_batch
        if not age:
            return self
        if self.scorer.reuse_reference:
            raise ValueError(
                f"scorer.reference_age = {age} cannot be with reuse_reference, whose reference is the policy as the "
                "batch begins. Set reference_age to 0, or leave one of them out"
            )
        if age > greatest:
            raise ValueError(
                f"scorer.reference_age = {age} is older than samples may be: max_staleness = "
                f"{self.orchestrator.max_staleness} lets them be {greatest} batches old. "
                f"Set reference_age to at most {greatest}, or raise max_staleness"
            )
        if age + 2 > self.weights.keep_versions:
            raise ValueError(
                f"scorer.reference_age = {age} needs versions that weights.keep_versions = "
                f"{self.weights.keep_versions} does not keep. Raise keep_versions to {age + 2}"
            )
        return self

    @model_validator(mode="after")
    def _can_be_deterministic(self) -> JobSpec:
        if not self.run.deterministic:
            return self
        if (staleness := self.orchestrator.max_staleness) > 0:
            raise ValueError(
                f"run.deterministic = true cannot be with orchestrator.max_staleness = {staleness}: timing decides "
                "which version samples. Set max_staleness to 0, or leave deterministic out"
            )
        if self.rollout.engine == "vllm":
            raise ValueError(
                "run.deterministic = true cannot be with rollout.engine = 'vllm', whose passes mix requests as they "
                "come. Set rollout.engine to transformers, or leave deterministic out"
            )
        return self

    @model_validator(mode="after")
    def _vllm_samples_at_these_temperatures(self) -> JobSpec:
        if self.rollout.engine != "vllm":
            return self
        for name, temperature in (
            ("sampling", self.sampling.temperature),
            ("evaluation", self.evaluation_temperature),
        ):
            if (problem := temperature_problem(temperature)) is not None:
                raise ValueError(f"{name}.temperature = {temperature:g}: {problem}. {OTHER_TEMPERATURE}")
        return self

    @model_validator(mode="after")
    def _payloads_have_a_place(self) -> JobSpec:
        if self.bus.payload_store == "s3" and self.weights.store is None:
            raise ValueError(
                "bus.payload_store = 's3' has no bucket. Set weights.store to s3://bucket/prefix, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _transport_fits(self) -> JobSpec:
        transport = self.weights.transport
        if transport != "store" and self.rollout.engine == "transformers":
            raise ValueError(
                f"weights.transport = {transport!r} is beyond the transformers engine. "
                "Set rollout.engine to vllm, or weights.transport to store"
            )
        if transport == "nccl" and "cpu" in (self.rollout.device, self.learner.device):
            raise ValueError(
                "weights.transport = 'nccl' goes from GPU to GPU, and rollout.device or learner.device is cpu. "
                "Set weights.transport to store"
            )
        return self

    @property
    def on_policy(self) -> bool:
        """Whether the policy samples for itself."""
        return self.actor == "policy"

    @property
    def rollout_model(self) -> ModelConfig:
        """The model that the rollout replicas hold."""
        return self.policy if isinstance(self.actor, str) else self.actor

    @property
    def rollout_role(self) -> Literal["policy", "actor"]:
        """Whose weight versions the rollout replicas pull."""
        return "policy" if self.on_policy else "actor"

    @property
    def samples_in_float32(self) -> bool:
        """Whether engine and learner compute what samples alike but for rounding."""
        model = self.rollout_model
        cheap = isinstance(model, ActorConfig) and (model.quantization is not None or model.kv_cache_dtype != "auto")
        return model.dtype == self.policy.dtype == "float32" and not cheap

    @property
    def reference_age(self) -> int:
        """How many batches old the policy is that scores a batch."""
        if self.scorer.reference_age is not None:
            return self.scorer.reference_age
        overlap = self.orchestrator.max_staleness // self.learner.updates_per_batch
        return 0 if self.scorer.reuse_reference else min(1, overlap)

    def start_step(self, slot: int) -> int:
        """The optimizer step at which the batch of a slot begins to train."""
        return slot // self.learner.groups_per_batch * self.learner.updates_per_batch

    def reference_version(self, slot: int) -> int:
        """The version of the policy that scores the group of a slot: the same for all groups of a batch."""
        return max(0, self.start_step(slot) - self.reference_age * self.learner.updates_per_batch)

    @property
    def deterministic(self) -> bool:
        """Whether each group is sampled and scored by itself, so that a seed determines every bit."""
        possible = self.orchestrator.max_staleness == 0 and self.rollout.engine != "vllm"
        return possible if self.run.deterministic is None else self.run.deterministic

    @property
    def scorer_replicas(self) -> int:
        """Scorers that run: none if the learner's own forward pass gives the scores."""
        return 0 if self.scorer.reuse_reference else self.scorer.replicas

    @property
    def scorer_runs_actor(self) -> bool:
        """Whether the normalizer needs the actor's own forward pass in the scorer. With ``target: policy`` it does not:
        the learner makes the scores that count, and has no such pass either."""
        obrs = self.algorithm.correction.obrs
        return obrs is not None and obrs.target != "policy" and obrs.needs_actor_forward

    @property
    def policy_versions_held(self) -> int:
        """Versions of the policy that a scorer keeps in host memory so that none is read twice: from the reference of a
        batch to the newest, and two at least, since groups of two batches may come mixed."""
        return max(2, self.reference_age + 1)

    @property
    def actor_versions_held(self) -> int:
        """Versions of the actor that a scorer keeps in host memory: three where it runs it, since with updates in
        flight a trajectory mixes a few."""
        return 3 if self.scorer_runs_actor else 0

    @property
    def evaluation_temperature(self) -> float:
        """What evaluations sample at: the temperature of training unless they have their own."""
        temperature = self.evaluation.temperature
        return self.sampling.temperature if temperature is None else temperature

    @property
    def num_batches(self) -> int:
        """Batches in the whole job."""
        return self.learner.steps // self.learner.updates_per_batch

    @property
    def num_groups(self) -> int:
        """Groups that the whole job trains on."""
        return self.num_batches * self.learner.groups_per_batch
