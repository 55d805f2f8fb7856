"""The plan of a job. The formulas are explained in docs/planning.md; each function here is one of its paragraphs."""

from __future__ import annotations

from dataclasses import dataclass, field

from jackpot.config import ActorConfig, JobSpec
from jackpot.planning.hardware import Gpu, Utilization
from jackpot.planning.model_shape import BYTES, ModelShape


@dataclass(frozen=True, slots=True)
class Load:
    """A job's load, and its hardware."""

    prompt_tokens: float  # mean
    completion_tokens: float  # mean
    concurrency: int  # trajectories decoded together by one replica
    gpu: Gpu
    utilization: Utilization = field(default_factory=Utilization)
    rollout_share: float | None = None  # share of an on-policy step's time; None: computed


@dataclass(frozen=True, slots=True)
class FlopsPerToken:
    """FLOPs by service: 2N for a forward pass, 6N for forward and backward, with attention separate."""

    rollout: float
    rollout_on_policy: float
    scoring: float
    policy_training: float
    actor_training: float


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """The time of one optimizer step's batch in each service, on all of its GPUs."""

    rollout: float
    scorer: float
    learner: float


@dataclass(frozen=True, slots=True)
class Plan:
    """A job's plan. All figures are computed. Sizes are in bytes, times in seconds."""

    policy_parameters: int
    actor_parameters: int
    tokens_per_step: float
    flops_per_token: FlopsPerToken
    flops_per_step: FlopsPerToken
    memory_bytes: dict[str, dict[str, float]]  # by service, of one GPU
    learner_host_bytes: dict[str, float]  # of one process of the learner, beside what it computes with
    scorer_host_bytes: dict[str, float]  # of one scorer, all of its processes together; empty if none runs
    bus_bytes_per_step: dict[str, float]
    weight_bytes_per_version: dict[str, float]
    step_seconds: StepSeconds
    bottleneck: str
    on_policy_rollout_share: float
    gain: float
    warnings: tuple[str, ...]


def make_plan(job: JobSpec, policy: ModelShape, actor: ModelShape, load: Load) -> Plan:
    """The plan of a job with models of these shapes."""
    per_token = flops_per_token(job, policy, actor, load)
    batch = job.learner.groups_per_batch / job.learner.updates_per_batch
    trajectories = batch * job.sampling.group_size
    tokens = trajectories * load.completion_tokens
    seconds = step_seconds(job, policy, actor, load, trajectories)
    memory = memory_bytes(job, policy, actor, load)
    share = on_policy_rollout_share(job, policy, load) if load.rollout_share is None else load.rollout_share
    return Plan(
        policy_parameters=policy.parameters,
        actor_parameters=actor.parameters,
        tokens_per_step=tokens,
        flops_per_token=per_token,
        flops_per_step=FlopsPerToken(**{name: getattr(per_token, name) * tokens for name in per_token.__slots__}),
        memory_bytes=memory,
        learner_host_bytes=learner_host_bytes(job, policy, actor),
        scorer_host_bytes=scorer_host_bytes(job, policy, actor),
        bus_bytes_per_step=bus_bytes(job, tokens),
        weight_bytes_per_version=weight_bytes(job, policy, actor),
        step_seconds=seconds,
        bottleneck=max(seconds.__slots__, key=lambda service: float(getattr(seconds, service))),
        on_policy_rollout_share=share,
        gain=expected_gain(job, policy, actor, load, share),
        warnings=tuple(_warnings(memory, load)),
    )


def flops_per_token(job: JobSpec, policy: ModelShape, actor: ModelShape, load: Load) -> FlopsPerToken:
    """Arithmetic per completion token. Prompts count as free: a group shares its prompt, or prompts are short."""
    context = load.prompt_tokens + load.completion_tokens / 2

    def forward(shape: ModelShape) -> float:
        return 2.0 * shape.active_parameters + shape.attention_flops(context)

    return FlopsPerToken(
        rollout=forward(actor),
        rollout_on_policy=forward(policy),
        scoring=forward(policy) if job.scorer_replicas else 0.0,
        policy_training=3 * forward(policy),
        actor_training=3 * forward(actor) if trains_actor(job) else 0.0,
    )


def decode_seconds_per_token(shape: ModelShape, weight_bytes: int, kv_bytes: int, load: Load) -> float:
    """For one GPU: a decoding step reads the weights once and every trajectory's cache, or computes if that is slower.

    Args:
        shape: the model that samples.
        weight_bytes: bytes of a weight.
        kv_bytes: bytes of a number in the attention cache.
        load: lengths, concurrency and hardware.
    """
    context = load.prompt_tokens + load.completion_tokens / 2
    read = shape.active_parameters * weight_bytes + load.concurrency * context * shape.kv_bytes(kv_bytes)
    reading = read / (load.gpu.bandwidth * load.utilization.decoding)
    flops = load.concurrency * (2.0 * shape.active_parameters + shape.attention_flops(context))
    return max(reading, flops / (load.gpu.flops * load.utilization.scoring)) / load.concurrency


def step_seconds(job: JobSpec, policy: ModelShape, actor: ModelShape, load: Load, trajectories: float) -> StepSeconds:
    """A batch's time in each service, its work split evenly over the service's GPUs."""
    tokens = trajectories * load.completion_tokens
    read = trajectories * (load.prompt_tokens + load.completion_tokens)  # by scoring and training
    per_token = flops_per_token(job, policy, actor, load)
    vllm = job.rollout.vllm
    rollout_gpus = job.rollout.replicas * vllm.tensor_parallel_size * vllm.data_parallel_size
    decoding = decode_seconds_per_token(actor, *_rollout_bytes(job), load)
    rate = load.gpu.flops * load.utilization.training
    scorer_gpus = job.scorer_replicas * job.scorer.processes
    scoring = read * per_token.scoring / (load.gpu.flops * load.utilization.scoring)
    return StepSeconds(
        rollout=tokens * decoding / rollout_gpus,
        scorer=scoring / scorer_gpus if scorer_gpus else 0.0,
        learner=read * (per_token.policy_training + per_token.actor_training) / rate / _learner_processes(job),
    )


def on_policy_rollout_share(job: JobSpec, policy: ModelShape, load: Load) -> float:
    """The share of GPU time that sampling with the policy itself takes of an on-policy step."""
    rollout = load.completion_tokens * decode_seconds_per_token(policy, *_policy_bytes(job), load)
    training = (load.prompt_tokens + load.completion_tokens) * flops_per_token(
        job, policy, policy, load
    ).policy_training
    return rollout / (rollout + training / (load.gpu.flops * load.utilization.training))


def expected_gain(job: JobSpec, policy: ModelShape, actor: ModelShape, load: Load, share: float) -> float:
    """GPU time of an on-policy step over that of this job's, if ``share`` of the former is sampling.

    The rest is the policy's training. This job samples with the actor, trains the actor too, and scores, unless the
    learner's own forward pass replaces scoring.
    """
    per_token = flops_per_token(job, policy, actor, load)
    sampling = decode_seconds_per_token(actor, *_rollout_bytes(job), load) / decode_seconds_per_token(
        policy, *_policy_bytes(job), load
    )
    # A forward pass reaches a different fraction of the arithmetic than training.
    scoring = per_token.scoring * load.utilization.training / load.utilization.scoring
    training = (per_token.policy_training + per_token.actor_training + scoring) / per_token.policy_training
    return 1.0 / (share * sampling + (1.0 - share) * training)


def memory_bytes(job: JobSpec, policy: ModelShape, actor: ModelShape, load: Load) -> dict[str, dict[str, float]]:
    """Memory of one GPU of each service; the scorer is left out if none runs."""
    longest = load.prompt_tokens + job.sampling.max_tokens
    weight, kv = _rollout_bytes(job)
    tensor_parallel = job.rollout.vllm.tensor_parallel_size
    slice_bytes = 4.0 * job.scorer.chunk_tokens * min(policy.vocabulary, actor.vocabulary)
    rollout = {
        "weights": actor.parameters * weight / tensor_parallel,
        "attention_cache": load.concurrency * longest * actor.kv_bytes(kv) / tensor_parallel,
    }
    learner = _learner_memory(job, policy, actor, load) | {"vocabulary_slice": 2 * slice_bytes}
    if not job.scorer_replicas:
        return {"rollout": rollout, "learner": learner}
    scorer = _scorer_memory(job, policy, load) | {"vocabulary_slice": slice_bytes}
    return {"rollout": rollout, "scorer": scorer, "learner": learner}


def learner_host_bytes(job: JobSpec, policy: ModelShape, actor: ModelShape) -> dict[str, float]:
    """Host memory of one process of the learner, for the canary: past versions of the model that samples, in the format
    that computes, and its own weights while they give way to these. Those are float32 where they are shards."""
    learns = (
        job.on_policy or trains_actor(job) or (isinstance(job.actor, ActorConfig) and job.actor.weights == "policy")
    )
    versions = job.orchestrator.max_staleness // job.learner.updates_per_batch
    if not (learns and job.alarms.canary_sequences and versions):
        return {"past_versions": 0.0, "own_weights": 0.0}
    shape, number = (actor, _actor_bytes(job)) if trains_actor(job) else (policy, BYTES[job.policy.dtype])
    processes = _learner_processes(job)
    own = 4 if processes > 1 or job.learner.cpu_offload else number
    return {
        "past_versions": float(versions * shape.parameters * number) / processes,
        "own_weights": float(shape.parameters * own) / processes,
    }


def scorer_host_bytes(job: JobSpec, policy: ModelShape, actor: ModelShape) -> dict[str, float]:
    """Weight versions that a scorer holds in host memory beside the models that compute: those it keeps, and one that
    is being read."""
    if not job.scorer_replicas:
        return {}
    versions = {"policy_versions": (job.policy_versions_held + 1.0) * policy.parameters * BYTES[job.policy.dtype]}
    if job.scorer_runs_actor:
        versions["actor_versions"] = (job.actor_versions_held + 1.0) * actor.parameters * _actor_bytes(job)
    return versions


def _scorer_memory(job: JobSpec, policy: ModelShape, load: Load) -> dict[str, float]:
    """Sharded weights; the gathered part during a pass; activations of one layer."""
    policy_bytes = BYTES[job.policy.dtype]
    scored = min(job.scorer.max_batch_tokens, _tokens_taken(job, load))
    widest = max(4 * policy.hidden, 2 * policy.active_experts * policy.intermediate + policy.hidden)
    return {
        "weights": float(policy.parameters * policy_bytes) / job.scorer.processes,
        "gathered": float(_gathered(policy) * policy_bytes) if job.scorer.processes > 1 else 0.0,
        "activations": float(scored * widest * policy_bytes),
    }


def _learner_memory(job: JobSpec, policy: ModelShape, actor: ModelShape, load: Load) -> dict[str, float]:
    """Sharded float32 weights, gradients and moments; compute copies of weights; activations."""
    learning = [(policy, BYTES[job.policy.dtype])]
    if trains_actor(job):
        learning.append((actor, _actor_bytes(job)))
    sharded = 4.0 * sum(shape.parameters for shape, _ in learning) / _learner_processes(job)
    on_device = 0.0 if job.learner.cpu_offload else sharded
    if _learner_processes(job) > 1 or job.learner.cpu_offload:
        copies = sum(_gathered(shape) * size for shape, size in learning)
    else:
        copies = sum(shape.parameters * size for shape, size in learning if size < 4)
    trained = min(job.learner.max_batch_tokens, _tokens_per_batch(job, load) / _learner_processes(job))
    if job.learner.activation_checkpointing:
        kept = [
            (shape.layers * shape.hidden + shape.activation_elements() / shape.layers, size) for shape, size in learning
        ]
    else:
        kept = [(float(shape.activation_elements()), size) for shape, size in learning]
    return {
        "weights": on_device,
        "gradients": on_device,
        "optimizer": 2 * on_device,
        "copies": float(copies),
        # The models run their backward passes one after the other.
        "activations": max(trained * elements * size for elements, size in kept),
    }


def _gathered(shape: ModelShape) -> int:
    """Parameters of a sharded model that a pass gathers: embeddings, output layer and one block."""
    return shape.parameters - (shape.layers - 1) * shape.block


def bus_bytes(job: JobSpec, tokens: float) -> dict[str, float]:
    """Bytes over the bus in a step, before compression: id and log-probability, and k candidates until scoring."""
    obrs = job.algorithm.correction.obrs
    candidates = job.rollout.top_logprobs * (4 + 2)
    keeps_candidates = obrs is not None and (obrs.target == "policy" or job.scorer.reuse_reference)
    scores = 5 * 4 + 1 if job.scorer_replicas else 0  # five float32 numbers and a mask
    return {
        "to_score": tokens * (8 + candidates) if job.scorer_replicas else 0.0,
        "to_train": tokens * (8 + scores + (candidates if keeps_candidates else 0)),
    }


def weight_bytes(job: JobSpec, policy: ModelShape, actor: ModelShape) -> dict[str, float]:
    """Bytes through the weight store with each version: written once, read by every replica."""
    policy_bytes = float(policy.parameters * BYTES[job.policy.dtype])
    actor_bytes = 0.0 if job.on_policy else float(actor.parameters * _actor_bytes(job))
    rollout_bytes = policy_bytes if job.on_policy else actor_bytes
    return {
        "written": policy_bytes + actor_bytes,
        "read_by_scorers": job.scorer_replicas * policy_bytes,
        "read_by_rollouts": job.rollout.replicas * rollout_bytes,
    }


def trains_actor(job: JobSpec) -> bool:
    """Whether the actor learns."""
    return not isinstance(job.actor, str) and job.actor.train


def with_models(job: JobSpec, policy: str | None, actor: str | None) -> JobSpec:
    """The same job on other models, in bfloat16."""
    update: dict[str, object] = {}
    if policy is not None:
        update["policy"] = job.policy.model_copy(update={"model": policy, "dtype": "bfloat16"})
    if actor is not None and not isinstance(job.actor, str):
        update["actor"] = job.actor.model_copy(update={"model": actor, "dtype": "bfloat16"})
    return job.model_copy(update=update)


def _rollout_bytes(job: JobSpec) -> tuple[int, int]:
    """Bytes of a weight and of a number in the attention cache, in the rollout replicas."""
    if isinstance(job.actor, str):
        return _policy_bytes(job)
    size = BYTES[job.actor.dtype]
    return 1 if job.actor.quantization else size, 1 if job.actor.kv_cache_dtype == "fp8" else size


def _policy_bytes(job: JobSpec) -> tuple[int, int]:
    return BYTES[job.policy.dtype], BYTES[job.policy.dtype]


def _actor_bytes(job: JobSpec) -> int:
    return BYTES[job.rollout_model.dtype]


def _learner_processes(job: JobSpec) -> int:
    return job.learner.processes


def _tokens_per_batch(job: JobSpec, load: Load) -> float:
    update = job.learner.groups_per_batch / job.learner.updates_per_batch * job.sampling.group_size
    return update * (load.prompt_tokens + load.completion_tokens)


def _tokens_taken(job: JobSpec, load: Load) -> float:
    taken = job.scorer.max_groups_per_batch * job.sampling.group_size
    return taken * (load.prompt_tokens + load.completion_tokens)


def _warnings(memory: dict[str, dict[str, float]], load: Load) -> list[str]:
    return [
        f"the {service} needs {sum(parts.values()) / 1e9:.0f} GB of one GPU, which has {load.gpu.memory / 1e9:.0f}: "
        f"{REMEDIES[service]}"
        for service, parts in memory.items()
        if sum(parts.values()) > load.gpu.memory
    ]


REMEDIES = {
    "rollout": "raise rollout.vllm.tensor_parallel_size, or lower --concurrency",
    "scorer": "lower scorer.max_batch_tokens, or use bfloat16",
    "learner": "raise learner.processes, lower learner.max_batch_tokens, or turn on learner.activation_checkpointing",
}
