"""The layout of the learner's and the scorer's passes: rows of similar length, in which siblings may share a prompt,
or one packed row."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from jackpot.compute import varlen
from jackpot.compute.batching import AttentionCost
from jackpot.compute.forward import CompletionStates, completion_hidden, packed_completion_hidden
from jackpot.compute.models import architecture
from jackpot.compute.packing_trial import agreed_problem_with_varlen, packs_exactly
from jackpot.compute.ranks.group import SOLO, Ranks
from jackpot.compute.shared_prompts import attention_cost
from jackpot.errors import ConfigError

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PassLayout:
    """The layout of a pass; by default one sequence a row."""

    states: CompletionStates = completion_hidden
    """Computes the sequences' hidden states."""
    packed: bool = False
    """One row without padding; otherwise rows of similar length."""
    attention: AttentionCost | None = None
    """The cost of attention; None if no sequences share a prompt."""


def layout_of(
    packing: Literal["auto", "always", "never"],
    models: Sequence[tuple[PreTrainedModel, torch.dtype]],
    device: torch.device,
    ranks: Ranks = SOLO,
    has_varlen: varlen.HasKernel = varlen.is_available,
) -> PassLayout:
    """The layout that a job's ``packing`` gives with these models; a collective for sharded ones.

    Args:
        packing: the learner's or the scorer's.
        models: the models of the passes, each with its compute dtype. They attend by lengths afterwards if all can and
            sequences are packed.
        device: where they compute.
        ranks: over which the models are sharded; all of them try, and rank 0's result counts.
        has_varlen: whether torch has the kernel for that.

    Raises:
        ConfigError: the job requires packing, and a model lets packed sequences see each other.
    """
    if packing == "never":
        return PassLayout()
    plain = [model for model, _ in models]
    shared = attention_cost(plain, device, ranks) if packing == "auto" else None
    problem = agreed_problem_with_varlen(models, device, ranks, has_varlen)
    if problem is not None and packing == "auto":
        LOG.info("sequences are not packed: %s", problem)
        return PassLayout(attention=shared)
    if problem is None:
        for model in plain:
            varlen.switch(model)
    else:
        _require_exact(plain, ranks)
    LOG.info("sequences are packed", extra={"attention": "block-diagonal mask" if problem else "by lengths"})
    return PassLayout(packed_completion_hidden, packed=True, attention=shared)


def _require_exact(models: Sequence[PreTrainedModel], ranks: Ranks) -> None:
    for model in models:
        if not ranks.finding_of_rank_0(packs_exactly(model)):
            raise ConfigError(
                "learner.packing",
                "always",
                f"{architecture(model)} lets packed sequences see each other",
                "Set it to never.",
            )
