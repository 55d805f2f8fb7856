"""Selects the prompts that a job can use: those that can be encoded and leave room for the longest completion."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jackpot.config import JobSpec, ModelConfig
from jackpot.errors import ConfigError, PromptError
from jackpot.orchestrator.tasks import Item, prompt_key
from jackpot.orchestrator.tokenizer import PromptTokenizer
from jackpot.storage.model_configuration import ServedContext, read_served_context

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Turns items into token ids and refuses those that no engine accepts.

    Args:
        tokenizer: the policy's tokenizer.
        limit: positions for a prompt and its completion; None if no model states a limit.
        limit_field: the setting that sets the limit.
        max_tokens: length of the longest completion.
    """

    tokenizer: PromptTokenizer
    limit: int | None
    limit_field: str
    max_tokens: int

    @classmethod
    def of_job(cls, job: JobSpec, tokenizer: PromptTokenizer) -> PromptEncoder:
        """The encoder of a job whose models are directories."""
        models = {"policy": job.policy} | ({} if job.on_policy else {"actor": job.rollout_model})
        limits = {}
        for role, model in models.items():
            context = read_served_context(f"{role}.model", model.model, model.context_length)
            limits[_limit_name(role, model, context)] = context.positions
        if job.rollout.engine == "vllm":
            limits["rollout.vllm.max_model_len"] = job.rollout.vllm.max_model_len
        known = {field: limit for field, limit in limits.items() if limit is not None}
        field = min(known, key=known.__getitem__, default="")
        return cls(tokenizer, known.get(field), field, job.sampling.max_tokens)

    def encode(self, item: Item) -> NDArray[np.uint32]:
        """Token ids [P] of the item's prompt.

        Raises:
            PromptError: the prompt cannot be encoded or is too long. Names the row if the task does.
            ConfigError: the chat template refuses the messages.
        """
        try:
            ids = self.tokenizer.encode_prompt(item.prompt)
        except PromptError as error:
            raise PromptError(f"{_name(item)} {error}") from None
        if self.limit is not None and len(ids) + self.max_tokens > self.limit:
            raise PromptError(
                f"{_name(item)} has {len(ids)} tokens: with sampling.max_tokens = {self.max_tokens} more it exceeds "
                f"the {self.limit} positions of {self.limit_field}"
            )
        return ids


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The prompts of an evaluation: distinct ones that the policy can answer."""

    items: Sequence[Item]
    token_ids: Sequence[NDArray[np.uint32]]  # [P] each
    left_out: Sequence[str]  # why, for each item that is left out


def held_out(items: Sequence[Item], encoder: PromptEncoder) -> HeldOut:
    """The usable items among those that a task holds out.

    Items that differ only in white space are used once: copies would make the accuracy look more certain than it is.

    Raises:
        ConfigError: no item is left, or the chat template refuses the messages.
    """
    used: dict[str, tuple[Item, NDArray[np.uint32]]] = {}
    left_out = []
    for item in items:
        key = prompt_key(item.prompt)
        if key in used:
            left_out.append(f"{_name(item)} is a duplicate")
            continue
        try:
            used[key] = (item, encoder.encode(item))
        except PromptError as error:
            left_out.append(str(error))
    if not used:
        problem = f"no held-out prompt can be used; {left_out[0]}" if left_out else "no prompt is held out"
        raise ConfigError("evaluation.prompts", len(items), problem, "Give held-out prompts that fit, or shorten them.")
    return HeldOut([item for item, _ in used.values()], [ids for _, ids in used.values()], left_out)


def log_left_out(left_out: Sequence[str]) -> None:
    """Log how many held-out prompts are left out, and why the first ones are."""
    if left_out:
        LOG.warning("%d held-out prompts are left out: %s", len(left_out), "; ".join(left_out[:3]))


def _name(item: Item) -> str:
    line = item.metadata.get("line")
    return f"the prompt {str(item.prompt)[:40]!r}" if line is None else f"the prompt of line {line}"


def _limit_name(role: str, model: ModelConfig, context: ServedContext) -> str:
    """The setting that a limit comes from, for messages."""
    if model.context_length is not None:
        return f"{role}.context_length"
    if context.factors == "short":
        return f"{role}.model with its short rotary factors ({role}.context_length allows more, with the long ones)"
    return f"{role}.model"
