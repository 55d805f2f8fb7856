"""The models of a job: the policy that is trained, and the actor that samples."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from jackpot.section import Dtype, PositiveInt, Section


class ModelConfig(Section):
    """A causal language model."""

    model: str = Field(min_length=1)
    """A directory in Hugging Face format (config.json, *.safetensors, tokenizer.json), or
    ``builtin:<recipe>/<name>`` for a tiny model that Jackpot makes itself and caches."""
    dtype: Dtype = "float32"
    """Number format of the weights in every service. float32 is exact on CPU; use bfloat16 on GPUs."""
    context_length: PositiveInt | None = None
    """Longest sequence, prompt and completion together. null is ``max_position_embeddings`` of config.json, and for a
    longrope model (Phi-3.5, Phi-4-mini) ``original_max_position_embeddings``, up to which it has its short factors.
    With more than those it has its long factors at every length, see docs/models.md."""


class ActorConfig(ModelConfig):
    """The model that samples. It must share the policy's vocabulary."""

    train: bool = True
    """Whether the actor learns (its own PPO loss and distillation). A frozen actor drifts away from the policy."""
    weights: Literal["own", "policy"] = "own"
    """``policy``: the actor is the policy itself in a cheaper number format. It holds the policy's newest weights; give
    it the policy's model and ``train: false``."""
    quantization: Literal["fp8_per_channel", "fp8_per_tensor"] | None = None
    """Weights in 8 bits, rounded again with each version; ``dtype`` is the compute format. Needs the vLLM engine."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Number format of the attention cache; ``auto`` is the model's. ``fp8`` needs the vLLM engine."""
