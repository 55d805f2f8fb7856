"""How a learner's passes are laid out: rows of similar length, in which siblings may share a prompt, or one packed row;
and the check that a model can be packed."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from jackpot.config import LearnerConfig
from jackpot.errors import ConfigError
from jackpot.runtime.forward import CompletionStates, completion_hidden, packed_completion_hidden
from jackpot.runtime.ranks.group import SOLO, Ranks
from jackpot.runtime.shared_prompts import attention_tokens

LOG = logging.getLogger(__name__)

# Largest difference of hidden states accepted by the check, relative to the largest: rounding, no more.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@dataclass(frozen=True, slots=True)
class PassLayout:
    """How a learner lays out the sequences of a pass."""

    states: CompletionStates
    """Makes hidden states of them."""
    packed: bool = False
    """In one row without padding; else in rows of similar length."""
    attention_tokens: float | None = None
    """κ of :class:`jackpot.runtime.batching.Siblings`; None where every sequence has a row of its own."""


def layout_of(
    config: LearnerConfig, models: Sequence[tuple[PreTrainedModel, str]], device: torch.device, ranks: Ranks = SOLO
) -> PassLayout:
    """What the job's ``packing`` comes to with these models; a collective.

    Args:
        config: the job's ``packing``.
        models: what learns, not yet sharded, and what each computes in; gets flash attention where that is there.
        device: where they will compute.
        ranks: of which rank 0 has the models' weights.

    Raises:
        ConfigError: packing is asked for, and a model lets packed sequences see each other.
    """
    half = all(dtype == "bfloat16" for _, dtype in models)  # flash attention knows nothing wider
    varlen = half and device.type == "cuda" and is_flash_attn_2_available()
    if config.packing == "never":
        return PassLayout(completion_hidden)
    if config.packing == "auto" and not varlen:
        return PassLayout(completion_hidden, attention_tokens=_attention_tokens([model for model, _ in models], ranks))
    for model, _ in models:
        if varlen:
            model.set_attn_implementation("flash_attention_2")
        elif ranks.broadcast(b"exact" if ranks.rank == 0 and packs_exactly(model) else b"") != b"exact":
            raise ConfigError(
                "learner.packing",
                config.packing,
                f"{type(model).__name__} lets packed sequences see each other",
                "Set it to never.",
            )
    LOG.info("sequences are packed", extra={"attention": "flash" if varlen else "block-diagonal mask"})
    return PassLayout(packed_completion_hidden, packed=True)


def _attention_tokens(models: Sequence[PreTrainedModel], ranks: Ranks) -> float | None:
    """Rows are the same for all models: κ of the first, the policy; None if one of them cannot share prompts."""
    found: list[float | None] = []
    if ranks.rank == 0:
        found = [attention_tokens(model) for model in models]
    told = json.loads(ranks.broadcast(json.dumps(None if None in found else found[:1]).encode()))
    return float(told[0]) if told else None


@torch.no_grad()
def packs_exactly(model: PreTrainedModel) -> bool:
    """Whether packed sequences have the hidden states that they have alone."""
    random = np.random.default_rng(0)
    sequences = [random.integers(0, model.config.vocab_size, length) for length in (5, 3, 7)]
    packed = packed_completion_hidden(model, sequences, [2, 1, 3]).float()
    alone = torch.cat([completion_hidden(model, [s], [p]) for s, p in zip(sequences, [2, 1, 3], strict=True)]).float()
    bound = _TOLERANCE.get(model.dtype, 0.1) * float(alone.abs().max())
    return bool((packed - alone).abs().max() <= bound)
