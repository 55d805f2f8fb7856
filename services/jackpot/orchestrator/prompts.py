"""Selects the prompts that a job can use: those that can be encoded and leave room for the longest completion."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jackpot.config import JobSpec
from jackpot.errors import ConfigError, PromptError
from jackpot.orchestrator.tasks import Item, prompt_key
from jackpot.orchestrator.tokenizer import PromptTokenizer

LOG = logging.getLogger(__name__)

POSITION_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx")  # names in models' configurations


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
        models = {"policy.model": job.policy.model} | (
            {} if job.on_policy else {"actor.model": job.rollout_model.model}
        )
        limits = {field: _max_positions(Path(model)) for field, model in models.items()}
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


def _max_positions(model_dir: Path) -> int | None:
    """The longest sequence that a model supports; None if it does not say."""
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # another check finds incomplete model directories
    text = config.get("text_config")
    source: dict[str, Any] = text if isinstance(text, dict) else config
    lengths = [source[field] for field in POSITION_FIELDS if isinstance(source.get(field), int) and source[field] > 0]
    return min(lengths, default=None)
