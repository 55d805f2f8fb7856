"""What is sampled: prompts and their rewards, how the actor samples, held-out evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from jackpot.section import Float, Int, NonNegativeFloat, Number, PositiveFloat, PositiveInt, Section


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
