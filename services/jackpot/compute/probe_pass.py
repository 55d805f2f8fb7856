"""The pass behind a weight version's probe, see :mod:`jackpot.storage.weight_probe`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from jackpot.compute.models import hidden_states, output_head, vocabulary_size
from jackpot.compute.ranks.sharding import release
from jackpot.storage.weight_probe import probe_tokens

_UNLIMITED_POSITIONS = 1 << 30


def tokens_for(model: PreTrainedModel, seed: int) -> list[int]:
    """The probe's tokens for a model."""
    positions = getattr(model.config, "max_position_embeddings", None) or _UNLIMITED_POSITIONS
    return probe_tokens(vocabulary_size(model), positions, seed)


@torch.no_grad()
def probe_logprobs(model: PreTrainedModel, token_ids: Sequence[int]) -> list[float]:
    """log p of each token but the first, given those before it, in one pass. For a sharded model a collective."""
    ids = torch.tensor([token_ids], device=model.device)
    hidden = hidden_states(model, ids[:, :-1])[0]
    logprobs = torch.log_softmax(output_head(model).logits(hidden).float(), dim=-1)
    # Offloaded parameters lie in CPU memory, and FSDP brings the tokens to the device of the pass.
    found: list[float] = logprobs.gather(1, ids[0, 1:, None].to(hidden.device))[:, 0].tolist()
    release(model)
    return found
