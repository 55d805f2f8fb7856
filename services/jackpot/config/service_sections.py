"""Rollout, scorer, orchestrator, and what lies between the services: bus and weight store."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from jackpot.config.vllm import VllmConfig
from jackpot.section import (
    Device,
    NonNegativeInt,
    Number,
    PositiveFloat,
    PositiveInt,
    Section,
    refuse_shared_device,
)


class RolloutConfig(Section):
    """The rollout service: the actor behind gRPC."""

    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """``auto`` is vLLM if it is installed and a GPU is available, else transformers; the log says which and why."""
    replicas: PositiveInt = 1
    """Rollout processes. Each pulls new weights on its own."""
    device: Device = "auto"
    """``auto`` is CUDA where there is one."""
    top_logprobs: Annotated[int, Field(ge=1, le=1024), Number] = 20
    """k: how many of the actor's most probable tokens are returned per position (paper §4.4 uses 20)."""
    max_batch_size: PositiveInt = 256
    """Trajectories decoded together."""
    max_queue: PositiveInt = 1024
    """Trajectories waiting or running before a server answers RESOURCE_EXHAUSTED."""
    weight_poll_seconds: PositiveFloat = 0.05
    """How often a replica checks for a newer weight version, by reading one small file."""
    vllm: VllmConfig = VllmConfig()
    """Settings of the vLLM engine."""


class ScorerConfig(Section):
    """The OBRS scoring service: the target policy's log-probabilities, acceptance and normalizer."""

    replicas: PositiveInt = 1
    """Scorers. They share the work through the bus."""
    processes: PositiveInt = 1
    """Processes of one scorer, under torchrun: the policy is sharded over them (FSDP2), and each passes its part of the
    trajectories through it. The scores are the same as with one process, up to rounding. Use one until the policy
    needs more memory than a device has; more replicas are the faster way to use more devices."""
    device: Device = "auto"
    """``auto`` is CUDA if available; with several processes each takes its own GPU."""
    collective_timeout_seconds: PositiveFloat = 600.0
    """How long a process waits for the others in one exchange before all of them restart. A process that died is
    noticed at once; this is for one that hangs."""
    chunk_tokens: PositiveInt = 128
    """Positions per slice of the vocabulary pass. 128 keeps [chunk, vocabulary] small at the same speed."""
    max_batch_tokens: PositiveInt = 16384
    """Tokens (prompt and completion) in one forward pass."""
    packing: Literal["auto", "never"] = "auto"
    """``auto``: one after the other, without padding, where torch attends to sequences by their lengths (bfloat16 on
    a GPU); elsewhere rows of similar length. Either way completions of one prompt share it where that is less work:
    prompts about as long as completions, or longer. ``never`` gives each its own row. The scores are the same, up
    to rounding."""
    max_groups_per_batch: PositiveInt = 16
    """Groups taken from the bus at once."""
    reference_age: NonNegativeInt | None = None
    """How many batches old the reference is, the policy that scores a batch. 0 is the paper's: the policy as the batch
    begins; 1 is the policy as the batch before it began. All groups of a batch are scored by that one version. null is
    1 where sampling overlaps training (``max_staleness`` of a batch or more), else 0: with 1 scoring overlaps training
    as well, and the PPO clip can act in a batch's only update, without which the demo's learning rate ruins it
    (docs/training.md). With 0 and overlap, a batch is scored only once the one before it has been trained on."""
    reuse_reference: bool = False
    """Whether the learner's own forward pass gives the scores. No scorer runs then: groups go straight to the learner,
    and only ``chunk_tokens`` of this section still counts. For one update per batch and ``target: reference``; the
    reference is then the policy as the step begins (``reference_age`` 0). Off by default, where it is a batch older:
    only an old reference lets the PPO clip act in a batch's only update. Without the clip
    the learning rate alone bounds a step: halve it. The demo then ends at accuracy 0 with 1.5e-3, and at 0.97 with
    half of it (docs/training.md)."""
    weight_poll_seconds: PositiveFloat = 0.05
    """How often the scorer checks for a newer policy version."""
    version_timeout_seconds: PositiveFloat = 120.0
    """How long a group waits in the scorer for the policy version it was dispatched with, before that counts as a
    failed attempt. Versions are published before groups are dispatched with them, so a long wait means damage."""

    @model_validator(mode="after")
    def _processes_fit(self) -> ScorerConfig:
        for name in ("replicas", "processes"):
            if self.reuse_reference and (number := getattr(self, name)) > 1:
                raise ValueError(
                    f"{name} = {number} cannot be with reuse_reference, under which no scorer runs. "
                    f"Set {name} to 1, or leave reuse_reference out"
                )
        refuse_shared_device(self.processes, self.device)
        return self


class OrchestratorConfig(Section):
    """Dispatch of prompts to rollout replicas."""

    max_staleness: NonNegativeInt = 1
    """Greatest distance, in optimizer steps, between the version that sampled a token and the step that trains on it.
    0 is synchronous; 1 overlaps sampling with training."""
    max_in_flight_groups: PositiveInt = 64
    """Concurrent Generate calls, over all replicas."""
    attempts: PositiveInt = 3
    """How often a group is tried, each time on another replica, before it is dead-lettered."""
    generate_timeout_seconds: PositiveFloat = 600.0
    """Deadline of one Generate call."""


class BusConfig(Section):
    """The trajectory bus."""

    url: str | None = None
    """``redis://``, ``rediss://`` or ``unix://`` address of a Redis ≥ 7.0 or Valkey. null starts an embedded server."""
    payload_store: Literal["redis", "file", "s3"] = "file"
    """Where the arrays live; the stream carries only their ids. ``file`` is faster on one machine; ``s3`` is the object
    store of ``weights.store``, for volumes that cannot handle many small files."""
    max_bytes: PositiveInt = 1 << 30
    """Budget for groups on the bus; dispatch pauses while it is used up."""
    max_payload_bytes: PositiveInt = 256 << 20
    """Largest group accepted, after decompression."""
    lease_seconds: PositiveFloat = 30.0
    """How long a consumer may be silent before its groups go to another."""
    max_attempts: PositiveInt = 3
    """How often a group is delivered before it is dead-lettered."""


def _is_bucket(url: str) -> str:
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9!_.*'()-]+)*/?", url):
        raise ValueError("is no place in a bucket. Write s3://bucket or s3://bucket/prefix")
    if any(part in (".", "..") for part in url.split("/")):
        raise ValueError("has '.' or '..' for a part, which objects do not know. Write the prefix without them")
    return url.rstrip("/")


class WeightStoreConfig(Section):
    """Versioned weights between learner and replicas, and checkpoints."""

    store: Annotated[str, AfterValidator(_is_bucket)] | None = None
    """Where weight versions and checkpoints are kept. null is the run directory, which all processes share.
    ``s3://bucket/prefix`` keeps them in an S3 object store, under ``<prefix>/<job id>/``; credentials,
    region and endpoint come from the standard AWS variables, never from here. Needs the extra ``s3``."""
    outage_seconds: PositiveFloat = 600.0
    """How long an object store may be out of reach before the process that needs it gives up and is restarted.
    Training continues meanwhile with the weights at hand, as far as ``max_staleness`` allows."""
    keep_versions: Annotated[int, Field(ge=2), Number] = 8
    """Versions kept per role; with more, slow replicas and evaluations still find the version that they need."""
    transport: Literal["store", "nccl", "gloo"] = "store"
    """How rollout replicas receive new versions. ``store``: each reads them there, which works everywhere. ``nccl``:
    the learner broadcasts them from GPU to GPU, by vLLM's weight transfer; needs the vLLM engine. ``gloo``: the same
    over TCP without GPUs, to try it out. The store has every version in any case, for replicas that a broadcast
    misses."""
    transfer_timeout_seconds: PositiveFloat = 60.0
    """Deadline of a broadcast; a version that takes longer comes from the store. Enough for 100 GB over 25 Gbit/s."""
