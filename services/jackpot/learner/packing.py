"""Whether a learner's passes are rows of similar length or one packed row, and the check that a model can be packed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from jackpot.config import LearnerConfig
from jackpot.errors import ConfigError
from jackpot.runtime.forward import CompletionStates, completion_hidden, packed_completion_hidden
from jackpot.runtime.ranks.group import SOLO, Ranks

LOG = logging.getLogger(__name__)

# Largest difference of hidden states accepted by the check, relative to the largest: rounding, no more.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def states_of(
    config: LearnerConfig, models: Sequence[tuple[PreTrainedModel, str]], device: torch.device, ranks: Ranks = SOLO
) -> tuple[bool, CompletionStates]:
    """Whether passes are packed, and the function that makes hidden states of them; a collective.

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
    if config.packing == "never" or (config.packing == "auto" and not varlen):
        return False, completion_hidden
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
    return True, packed_completion_hidden


@torch.no_grad()
def packs_exactly(model: PreTrainedModel) -> bool:
    """Whether packed sequences have the hidden states that they have alone."""
    random = np.random.default_rng(0)
    sequences = [random.integers(0, model.config.vocab_size, length) for length in (5, 3, 7)]
    packed = packed_completion_hidden(model, sequences, [2, 1, 3]).float()
    alone = torch.cat([completion_hidden(model, [s], [p]) for s, p in zip(sequences, [2, 1, 3], strict=True)]).float()
    bound = _TOLERANCE.get(model.dtype, 0.1) * float(alone.abs().max())
    return bool((packed - alone).abs().max() <= bound)
