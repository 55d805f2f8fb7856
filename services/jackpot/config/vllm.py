"""Settings of the vLLM engine, in addition to those of every engine."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from jackpot.section import Number, PositiveInt, Section

# vLLM silently raises lower temperatures to this, and its log-probabilities would then not match the request. Above the
# other it refuses each request.
LOWEST_TEMPERATURE = 0.01
HIGHEST_TEMPERATURE = 2.0
OTHER_TEMPERATURE = "Use 0 (greedy, in evaluations) or a temperature in between, or rollout.engine transformers."


def temperature_problem(temperature: float) -> str | None:
    """Why vLLM cannot sample at a temperature; None if it can."""
    if temperature == 0 or LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        return None
    if temperature < LOWEST_TEMPERATURE:
        return f"vLLM samples at no temperature between 0 and {LOWEST_TEMPERATURE}"
    return f"vLLM samples at no temperature above {HIGHEST_TEMPERATURE:g}"


class VllmConfig(Section):
    """vLLM's own settings. The number formats of the model are under ``actor``."""

    tensor_parallel_size: PositiveInt = 1
    """GPUs over which one replica's model is split."""
    data_parallel_size: PositiveInt = 1
    """Copies of the model inside one replica. ``rollout.replicas`` does the same with processes that fail alone."""
    max_model_len: PositiveInt | None = None
    """Longest prompt and completion together; null is the model's limit. Shorter needs less memory."""
    gpu_memory_fraction: Annotated[float, Field(gt=0, le=1), Number] = 0.9
    """Part of the GPU's memory for weights and attention cache. Lower it where others use the same GPU."""
    kv_cache_bytes: PositiveInt | None = None
    """Memory for the attention cache; null is what ``gpu_memory_fraction`` leaves, or 256 MiB on CPU."""
    eager: bool = False
    """Whether to run without CUDA graphs: slower, but starts at once. Always so on CPU."""
    lora: None = None
    """Must be null: adapters are not supported."""

    @field_validator("lora", mode="before")
    @classmethod
    def _refuse_lora(cls, value: Any) -> Any:
        if value not in (None, False):
            raise ValueError(
                "LoRA is not supported: versions of weights are whole models, and vLLM would sample from adapters "
                "that the scorer does not have. Leave rollout.vllm.lora out; merge adapters into the model instead"
            )
        return None
