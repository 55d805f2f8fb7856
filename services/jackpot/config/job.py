"""The job file: one frozen, strict model per section. The docstring under a field is its documentation and
its JSON Schema description; every default is written with its reason."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from jackpot.config.algorithm import AlgorithmConfig
from jackpot.config.section import (
    Device,
    Dtype,
    Float,
    Fraction,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    Number,
    PositiveFloat,
    PositiveInt,
    Section,
)
from jackpot.config.vllm import VllmConfig


class ModelConfig(Section):
    """A causal language model."""

    model: str = Field(min_length=1)
    """A directory in Hugging Face format (config.json, *.safetensors, tokenizer.json), or
    ``builtin:<recipe>/<name>`` for a tiny model that Jackpot makes itself and caches."""
    dtype: Dtype = "float32"
    """Number format of the weights in every service. float32 is exact on CPU; use bfloat16 on GPUs."""


class ActorConfig(ModelConfig):
    """The model that samples. It must share the policy's vocabulary."""

    train: bool = True
    """Whether the actor learns (its own PPO loss and distillation). A frozen actor drifts away from the policy."""
    weights: Literal["own", "policy"] = "own"
    """``policy``: the actor is the policy itself in a cheaper number format. It holds the policy's newest weights; give
    it the policy's model and ``train: false``."""
    quantization: Literal["fp8_per_channel", "fp8_per_tensor"] | None = None
    """Weights in 8 bits, rounded anew with each version; ``dtype`` is what it computes in. Needs the vLLM engine."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Number format of the attention cache; ``auto`` is the model's. ``fp8`` needs the vLLM engine."""


class TaskConfig(Section):
    """Where prompts and rewards come from."""

    name: str = Field(min_length=1)
    """``reasoning_gym:<dataset>``, ``jsonl``, ``python:<module>:<attribute>``, or a task that an installed
    package registers under the entry point group ``jackpot.tasks`` (``complement`` comes with Jackpot)."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the task. For ``jsonl``: ``path``, ``eval_path``, ``reward`` (``exact_match``, ``math_verify``)."""
    system_prompt: str | None = None
    """System message put before each prompt when a chat template is used."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """``auto`` uses the tokenizer's chat template where there is one, else the plain prompt."""
    reward_timeout_seconds: PositiveFloat = 30.0
    """A reward that takes longer counts as failed. Symbolic checkers rarely need a second."""
    reward_attempts: PositiveInt = 2
    """How often a failing reward is tried before its group is dead-lettered."""


class SamplingConfig(Section):
    """How the actor samples. Only temperature changes the distribution: anything that truncates or penalises
    would make the engine's log-probabilities differ from those of the distribution sampled from."""

    temperature: PositiveFloat = 1.0
    """Divides the logits of every model, in sampling and in scoring."""
    max_tokens: PositiveInt = 256
    """Longest completion in tokens. Completions cut here are counted as truncated."""
    stop: tuple[str, ...] = ()
    """Extra stop strings, each a single token of the tokenizer. The tokenizer's end-of-sequence token always stops."""
    group_size: Annotated[int, Field(ge=1), Number] = 8
    """Trajectories per prompt. GRPO needs at least 2; 8 is the paper's and the field's usual value."""
    top_p: Float = 1.0
    """Must be 1: nucleus sampling changes p_inf behind the engine's log-probabilities."""
    top_k: Int = 0
    """Must be 0 (off), for the same reason."""
    min_p: Float = 0.0
    """Must be 0 (off), for the same reason."""
    repetition_penalty: Float = 1.0
    """Must be 1 (off), for the same reason."""

    @field_validator("top_p", "top_k", "min_p", "repetition_penalty")
    @classmethod
    def _refuse_truncated_sampling(cls, value: float, info: ValidationInfo) -> float:
        neutral = cls.model_fields[str(info.field_name)].default
        if value != neutral:
            raise ValueError(
                "this truncates or reshapes the distribution sampled from, so that the engine's log-probabilities, "
                "and with them acceptance and importance ratios, would be wrong. "
                f"Set {info.field_name} to {neutral!r} and use temperature instead"
            )
        return value


class RolloutConfig(Section):
    """The rollout service: the actor behind gRPC."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """``auto`` takes vLLM where it imports and a GPU is there, else transformers, and logs which and why."""
    replicas: PositiveInt = 1
    """Rollout processes. Each pulls new weights on its own."""
    device: Device = "auto"
    """``auto`` is CUDA where there is one."""
    top_logprobs: Annotated[int, Field(ge=1, le=1024), Number] = 20
    """k: how many of the actor's most probable tokens come back per position (paper §4.4 uses 20)."""
    max_batch_size: PositiveInt = 256
    """Trajectories decoded together."""
    max_queue: PositiveInt = 1024
    """Trajectories waiting or running before a server answers RESOURCE_EXHAUSTED."""
    weight_poll_seconds: PositiveFloat = 0.05
    """How often a replica looks for a newer weight version. Reading one small file: cheap."""
    vllm: VllmConfig = VllmConfig()
    """Settings of the vLLM engine."""


class ScorerConfig(Section):
    """The OBRS scoring service: the target policy's log-probabilities, acceptance and normalizer."""

    replicas: PositiveInt = 1
    """Scorer processes. They share the work through the bus."""
    device: Device = "auto"
    """``auto`` is CUDA where there is one."""
    chunk_tokens: PositiveInt = 128
    """Positions per slice of the vocabulary pass. 128 keeps [chunk, vocabulary] small at the same speed."""
    max_batch_tokens: PositiveInt = 16384
    """Tokens (prompt and completion) in one forward pass."""
    max_groups_per_batch: PositiveInt = 16
    """Groups taken from the bus at once."""
    reuse_reference: bool = False
    """Whether the learner's own forward pass gives the scores, so that the scorer runs no model and passes groups on.
    For one update per batch and ``target: reference``; the reference is then the policy as the step begins. Off by
    default, where the reference is the version that scored, up to ``max_staleness`` older: only an old reference lets
    the PPO clip act in a batch's only update."""
    weight_poll_seconds: PositiveFloat = 0.05
    """How often the scorer looks for a newer policy version."""
    version_timeout_seconds: PositiveFloat = 120.0
    """How long a group waits in the scorer for the policy version it was dispatched with, before that counts as a
    failed attempt. Versions are published before groups are dispatched with them, so waiting long means damage."""


class ScheduleConfig(Section):
    """A learning-rate schedule."""

    name: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up; linear and cosine end at ``final_fraction`` of the peak."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up from zero."""
    final_fraction: Fraction = 0.0
    """Where linear and cosine end, as a fraction of the peak."""


class LearnerConfig(Section):
    """The learner service."""

    steps: PositiveInt = 100
    """Optimizer steps in all."""
    groups_per_batch: PositiveInt = 16
    """Groups that are trained on together."""
    updates_per_batch: PositiveInt = 1
    """Optimizer steps per batch; the batch's groups are split evenly among them. 1 is fully on-batch."""
    lr: PositiveFloat = 1e-6
    """Peak learning rate of the policy. 1e-6 suits billions of parameters; tiny models want 1e-3."""
    actor_lr: PositiveFloat | None = None
    """Peak learning rate of the actor; null means the policy's. An actor that learns too slowly is left behind."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's moment decays."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay, on matrices only."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient norm clip, for policy and actor apart."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule of the policy."""
    actor_schedule: ScheduleConfig | None = None
    """Learning-rate schedule of the actor; null means the policy's. An actor that has to catch up wants no warm-up."""
    device: Device = "auto"
    """``auto`` is CUDA where there is one; with several processes each takes a GPU of its own."""
    processes: PositiveInt = 1
    """Processes that train together, under torchrun: policy and actor are sharded over them (FSDP2), and each passes
    its part of the batch through them. The result is that of one process, up to rounding. One, until a model needs
    more memory than a device has, or a step more time than it should take."""
    cpu_offload: bool = False
    """Keep parameters and optimizer state in the CPU's memory and bring a block to the GPU when it is its turn: a
    larger model, far slower steps. Needs a GPU."""
    activation_checkpointing: bool = False
    """Keep only what enters each block and compute the rest again in the backward pass: a third more work, and memory
    that hardly grows with depth. The numbers are the same."""
    compile: bool = False
    """torch.compile each block: faster steps on GPUs, after a first step that takes minutes."""
    packing: Literal["auto", "always", "never"] = "auto"
    """Lay sequences one after the other instead of padding them to rows of similar length. ``auto`` does where
    attention takes lengths as they are (flash attention: bfloat16 on a GPU); elsewhere the mask that keeps them apart
    costs memory and time with the square of ``max_batch_tokens``, and rows are cheaper."""
    max_batch_tokens: PositiveInt = 16384
    """Tokens in one forward and backward pass of one process; larger batches accumulate gradients. The split changes
    nothing: losses are divided by what the whole batch holds."""
    max_sequence_tokens: PositiveInt | None = None
    """Longest sequence (prompt and completion) that is trained on; what lies beyond is left out of the loss and
    counted as ``response/cut_tokens``. null is no bound: ``sampling.max_tokens`` already bounds completions."""
    profile_steps: NonNegativeInt = 0
    """Optimizer steps to record with torch's profiler, once per process and after its first batch: ``profile/`` of the
    run directory gets a trace per process for Perfetto. 0 records nothing; recording slows a step down."""
    collective_timeout_seconds: PositiveFloat = 600.0
    """How long a process waits for the others in one exchange before all of them start again from the last
    checkpoint. One that died is noticed at once; this is for one that hangs."""
    checkpoint_every: PositiveInt = 10
    """Optimizer steps between checkpoints. Groups count as trained once a checkpoint holds their effect."""
    keep_checkpoints: PositiveInt = 2
    """The newest that stay; older checkpoints are deleted."""
    keep_best_checkpoint: bool = True
    """Keep, besides, the checkpoint of the greatest held-out accuracy: training may run past its best. Make
    ``checkpoint_every`` and ``evaluation.every`` multiples of one another, so that checkpoints are evaluated."""
    overlap: bool = True
    """Whether the next batch is fetched and the new weights are written while the learner goes on. Off, everything
    takes its turn; the weights trained are the same. Costs a copy of the weights in memory."""
    batch_timeout_seconds: PositiveFloat = 600.0
    """How long the learner waits for a full batch before it stops with an error."""

    @model_validator(mode="after")
    def _batch_divides(self) -> LearnerConfig:
        if self.groups_per_batch % self.updates_per_batch:
            raise ValueError(
                f"groups_per_batch = {self.groups_per_batch} cannot be split evenly into "
                f"updates_per_batch = {self.updates_per_batch}. Make one a multiple of the other"
            )
        if self.steps % self.updates_per_batch:
            raise ValueError(
                f"steps = {self.steps} is not a whole number of batches of {self.updates_per_batch} updates. "
                f"Use a multiple of {self.updates_per_batch}"
            )
        if self.cpu_offload and self.device == "cpu":
            raise ValueError(
                "cpu_offload brings parameters to a GPU. Set device to auto or cuda, or cpu_offload to false"
            )
        if self.processes > 1 and self.device.startswith("cuda:"):
            raise ValueError(
                f"processes = {self.processes} cannot share device = {self.device!r}. "
                "Set device to cuda: each process takes a GPU of its own"
            )
        return self


class OrchestratorConfig(Section):
    """Dispatch of prompts to rollout replicas."""

    max_staleness: NonNegativeInt = 1
    """Greatest distance, in optimizer steps, between the version that sampled a token and the step that trains on it.
    0 is synchronous; 1 overlaps sampling with training."""
    max_in_flight_groups: PositiveInt = 64
    """Generate calls under way at once, over all replicas."""
    attempts: PositiveInt = 3
    """How often a group is tried, each time on another replica, before it is dead-lettered."""
    generate_timeout_seconds: PositiveFloat = 600.0
    """Deadline of one Generate call."""


class EvaluationConfig(Section):
    """Held-out evaluation of the policy on its own samples."""

    every: PositiveInt = 10
    """Optimizer steps between evaluations; step 0 and the last step are always evaluated."""
    prompts: PositiveInt = 128
    """Held-out prompts."""
    samples_per_prompt: PositiveInt = 1
    """n, completions per prompt. Accuracy is the mean over all (mean@n), ``pass_at_n`` the fraction of prompts with at
    least one right."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 is greedy."""
    timeout_seconds: PositiveFloat = 600.0
    """Deadline of one evaluation."""


class BusConfig(Section):
    """The trajectory bus."""

    url: str | None = None
    """``redis://``, ``rediss://`` or ``unix://`` address of a Redis ≥ 7.0 or Valkey. null starts an embedded server."""
    payload_store: Literal["redis", "file"] = "file"
    """Where the arrays live; the stream carries only their ids. ``file`` is faster on one machine."""
    max_bytes: PositiveInt = 1 << 30
    """Budget for groups on the bus; dispatch holds when it is spent."""
    max_payload_bytes: PositiveInt = 256 << 20
    """Largest group accepted, after decompression."""
    lease_seconds: PositiveFloat = 30.0
    """How long a consumer may be silent before its groups go to another."""
    max_attempts: PositiveInt = 3
    """How often a group is taken up before it is dead-lettered."""


class WeightStoreConfig(Section):
    """Versioned weights between learner and replicas."""

    keep_versions: Annotated[int, Field(ge=2), Number] = 8
    """Versions kept per role; more lets slow replicas and evaluations find the version that they want."""
    transport: Literal["store", "nccl", "gloo"] = "store"
    """How the rollout replicas get new versions. ``store``: each reads them there, which works everywhere. ``nccl``:
    the learner broadcasts them from GPU to GPU, by vLLM's weight transfer; needs the vLLM engine. ``gloo``: the same
    over TCP without GPUs, to try it out. The store has every version in any case, for replicas that a broadcast
    misses."""
    transfer_timeout_seconds: PositiveFloat = 60.0
    """Deadline of a broadcast; a version that takes longer comes from the store. Enough for 100 GB over 25 Gbit/s."""


class AlarmsConfig(Section):
    """Signs of collapse that the learner watches for after every step. Collapse is absorbing: equal rewards give zero
    advantages, which give a zero gradient, for ever."""

    action: Literal["warn", "stop"] = "warn"
    """``warn`` writes to the log, to ``alarms.jsonl`` and to a metric; ``stop`` also ends the job as failed, after a
    checkpoint. ``warn``, because a solved task looks like a collapsed one: all its rewards are equal, too."""
    equal_rewards_steps: NonNegativeInt = 10
    """Steps in a row without any difference between rewards; 0 is off. Ten batches by chance is no chance."""
    zero_gradient_steps: NonNegativeInt = 3
    """Steps in a row with a policy gradient of exactly 0; 0 is off."""
    kl_bound: PositiveFloat | None = 5.0
    """Greatest KL(policy ‖ actor), in nats per token (where the actor does not learn: k3's estimate of KL from scoring
    to sampling); null is off. At 5 the actor's tokens have next to no probability under the policy."""
    acceptance_bound: Fraction = 0.05
    """Smallest acceptance rate of a step; 0 is off. Below it nearly all that is sampled is thrown away, so that a step
    costs twenty times what it should."""
    accuracy_drop: Fraction = 0.1
    """How far the policy's held-out accuracy may fall below its best while the actor's mean reward rises, in two
    evaluations in a row; 0 is off. Rewards are the actor's: they can rise while the policy falls apart."""


class TrackingConfig(Section):
    """Experiment trackers. The run directory has every figure without them."""

    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where steps and evaluations go besides: ``tensorboard`` (files in ``tensorboard/`` of the run directory) and
    ``wandb``. Each needs the extra of its name."""
    wandb_project: str = Field(default="jackpot", min_length=1)
    """The project in Weights & Biases."""
    wandb_mode: Literal["online", "offline"] = "online"
    """``offline`` writes files for a later `wandb sync`; ``online`` needs `wandb login`."""


class RunConfig(Section):
    """The local run."""

    directory: str | None = None
    """Where the run directory goes; null is ``runs/<job id>``."""
    max_restarts: NonNegativeInt = 5
    """How often one process is restarted before the job stops with its last error."""
    keep_trajectories: NonNegativeInt = 2
    """How many of the last batches the learner keeps in ``trajectories/`` for `jackpot replay`; 0 keeps none. Two are
    enough to choose λ by, take few MB, and the weights that they belong to are still there."""
    threads_per_process: NonNegativeInt = 0
    """CPU threads per process for torch; 0 shares the cores out."""
    startup_timeout_seconds: PositiveFloat = 180.0
    """How long a process may take until it serves."""


class JobSpec(Section):
    """A training job, whole. What `jackpot run` takes and what the REST API accepts as JSON."""

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
        correction = self.algorithm.correction
        problem = None
        if self.learner.updates_per_batch > 1:
            problem = (
                f"learner.updates_per_batch = {self.learner.updates_per_batch}: later updates need an old reference"
            )
        elif correction.name == "jackpot" and correction.target == "policy":
            problem = "algorithm.correction.target = 'policy' never uses the scorer's scores"
        elif correction.name == "jackpot" and correction.normalizer != "tail":
            problem = f"algorithm.correction.normalizer = {correction.normalizer!r} needs the actor's forward pass"
        if problem is not None:
            raise ValueError(f"scorer.reuse_reference = true cannot be with {problem}. Leave reuse_reference out")
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
    def num_batches(self) -> int:
        """Batches in the whole job."""
        return self.learner.steps // self.learner.updates_per_batch

    @property
    def num_groups(self) -> int:
        """Groups that the whole job trains on."""
        return self.num_batches * self.learner.groups_per_batch
