"""Drawing tokens, one batch of rows at a time. Pure functions of logits and uniform numbers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# The greatest float32 below 1. A draw of exactly 1 would fall off the end of the distribution.
_BELOW_ONE = float(np.nextafter(np.float32(1), np.float32(0)))


class DrawnTokens(NamedTuple):
    """One token per row, and the values that OBRS needs."""

    tokens: Tensor  # int64 [B]
    logprobs: Tensor  # float32 [B], log p_inf of the token
    topk_ids: Tensor  # int64 [B, k], most probable first
    topk_logprobs: Tensor  # float32 [B, k], log p_inf


def trajectory_uniforms(seed: int, index: int, num_tokens: int) -> NDArray[np.float32]:
    """The uniform numbers in [0, 1) ``[num_tokens]`` that sample trajectory ``index`` of a group.

    A counter-based generator keyed by (seed, index): the same on every machine and in every batch.
    """
    philox = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))
    drawn = np.random.Generator(philox).random(num_tokens, dtype=np.float32)
    return np.minimum(drawn, np.float32(_BELOW_ONE))


def draw_tokens(logits: Tensor, temperatures: Tensor, uniforms: Tensor, top_k: int, any_greedy: bool) -> DrawnTokens:
    """Draw each row's next token by inverting its cumulative distribution, in the vocabulary's order.

    Args:
        logits: ``[B, V]``, before temperature.
        temperatures: float32 ``[B]``; 0 takes the most probable token, and log-probabilities of temperature 1.
        uniforms: float32 ``[B]``, in [0, 1).
        top_k: candidates to return, ≤ V.
        any_greedy: whether some temperature is 0; the caller knows this without reading from the device.
    """
    logits = logits.float()
    greedy = temperatures == 0
    divisors = torch.where(greedy, 1.0, temperatures) if any_greedy else temperatures
    logprobs = torch.log_softmax(logits / divisors[:, None], dim=-1)
    cumulative = logprobs.exp().cumsum(dim=-1)
    # Scaled by the last entry, which rounding keeps from being exactly 1, so that every draw hits a token.
    targets = (uniforms * cumulative[:, -1]).unsqueeze(1)
    tokens = torch.searchsorted(cumulative, targets, right=True).clamp_(max=logits.shape[-1] - 1)
    if any_greedy:
        tokens = torch.where(greedy[:, None], logits.argmax(dim=-1, keepdim=True), tokens)
    top = logprobs.topk(top_k, dim=-1) if top_k else None
    return DrawnTokens(
        tokens=tokens[:, 0],
        logprobs=logprobs.gather(1, tokens)[:, 0],
        topk_ids=top.indices if top else tokens[:, :0],
        topk_logprobs=top.values if top else logprobs[:, :0],
    )
