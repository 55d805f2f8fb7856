"""What is sampled: prompts and their rewards, how the actor samples, held-out evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from jackpot.section import Float, Fraction, Int, NonNegativeFloat, Number, PositiveFloat, PositiveInt, Section


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
    """How often a reward that raises, or ends its process, is tried before it counts as failed. One that takes longer
    than ``reward_timeout_seconds`` is not tried again: it would cost the same time again."""
    on_reward_failure: Literal["zero", "drop"] = "zero"
    """What a completion is worth whose reward failed: ``zero``, as a wrong one, or ``drop``, left out of its group.
    ``zero``, because what makes a grader fail is mostly the text that it reads: left out, such texts would never be
    punished. ``drop`` is for rewards that fail for reasons of their own, such as a judge behind a network. A group
    whose rewards all failed is dropped either way. Each failure is counted."""


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
    temperature: NonNegativeFloat | None = None
    """Sampling temperature; null is ``sampling.temperature``, under which the policy is trained. 0 is greedy, with one
    sample a prompt: more would all be the same."""
    max_failure_share: Fraction = 0.02
    """Largest share of samples whose reward may fail (see ``task.on_reward_failure``). An evaluation with more is not
    comparable: it is no candidate for the best checkpoint, and alarms leave it out. At 2 % the error is below the
    standard error of 128 prompts."""
    timeout_seconds: PositiveFloat = 600.0
    """Deadline of one evaluation."""

    @model_validator(mode="after")
    def _samples_differ(self) -> EvaluationConfig:
        if self.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError(
                f"evaluation.temperature = 0 makes all {self.samples_per_prompt} samples of a prompt the same. "
                "Set samples_per_prompt to 1, or leave temperature out"
            )
        return self
