"""Corrections without rejection: F on s = p_ref/p_inf. One function a correction, all of one form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Logarithms of ratios are cut here (a ratio of 5e8; verl has the same bound) and reported as clipped: products over
long completions leave float32, and one infinite weight would spoil the whole batch's gradient."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Weights:
    """What multiplies each token's loss, and what it was before it was cut. No gradient."""

    value: Tensor  # [tokens]
    raw: Tensor  # [tokens], before truncation, for the record
    clipped: Tensor  # [tokens] bool, where value differs from raw


def no_weights(reference_logprobs: Tensor, actor_logprobs: Tensor) -> Weights:
    """F(s) = 1: the trajectories count as the policy's own. [tokens] each."""
    ones = torch.ones_like(reference_logprobs.detach() - actor_logprobs.detach())
    return Weights(value=ones, raw=ones, clipped=torch.zeros_like(ones, dtype=torch.bool))


def is_weights(reference_logprobs: Tensor, actor_logprobs: Tensor, *, sequence_index: Tensor | None = None) -> Weights:
    """F(s) = s, importance sampling (AReaL).

    Args:
        reference_logprobs: log p_ref of the sampled tokens, [tokens].
        actor_logprobs: log p_inf, [tokens].
        sequence_index: [tokens] int64, the completion of each token, for Π s over the completion at each of its
            tokens in place of the token's own s; None for the token's own.
    """
    raw, beyond = _ratio(reference_logprobs, actor_logprobs, sequence_index)
    return Weights(value=raw, raw=raw, clipped=beyond)


def tis_weights(
    reference_logprobs: Tensor, actor_logprobs: Tensor, *, cap: float, sequence_index: Tensor | None = None
) -> Weights:
    """F(s) = min(s, C), truncated importance sampling (Flash-RL, LlamaRL).

    Args:
        reference_logprobs: log p_ref of the sampled tokens, [tokens].
        actor_logprobs: log p_inf, [tokens].
        cap: C > 0.
        sequence_index: as :func:`is_weights`.
    """
    raw, beyond = _ratio(reference_logprobs, actor_logprobs, sequence_index)
    return Weights(value=torch.clamp(raw, max=cap), raw=raw, clipped=beyond | (raw > cap))


def icepop_weights(reference_logprobs: Tensor, actor_logprobs: Tensor, *, low: float, high: float) -> Weights:
    """F(s) = s where low ≤ s ≤ high, else 0 (IcePop). [tokens] each."""
    raw, _ = _ratio(reference_logprobs, actor_logprobs, None)
    return _masked(raw, low, high)


def mis_weights(
    reference_logprobs: Tensor, actor_logprobs: Tensor, *, sequence_index: Tensor, cap: float, low: float = 0.0
) -> Weights:
    """F = Π s where low ≤ Π s ≤ C, else 0, with the product over the completion; masked importance sampling.

    Args:
        reference_logprobs: log p_ref of the sampled tokens, [tokens].
        actor_logprobs: log p_inf, [tokens].
        sequence_index: [tokens] int64, the completion of each token.
        cap: C > 0.
        low: completions below count nothing either.
    """
    raw, _ = _ratio(reference_logprobs, actor_logprobs, sequence_index)
    return _masked(raw, low, cap)


def _masked(raw: Tensor, low: float, high: float) -> Weights:
    outside = (raw < low) | (raw > high)
    return Weights(value=raw.masked_fill(outside, 0.0), raw=raw, clipped=outside)


def _ratio(reference_logprobs: Tensor, actor_logprobs: Tensor, sequence_index: Tensor | None) -> tuple[Tensor, Tensor]:
    """s, or Π s of the completion, and where its logarithm was cut at ± MAX_LOG_RATIO; [tokens] each."""
    log_ratio = reference_logprobs.detach() - actor_logprobs.detach()
    if sequence_index is not None and log_ratio.numel():
        sums = torch.zeros(int(sequence_index.max()) + 1, dtype=torch.float64, device=log_ratio.device)
        log_ratio = sums.index_add_(0, sequence_index, log_ratio.double())[sequence_index].to(log_ratio.dtype)
    beyond = log_ratio.abs() > MAX_LOG_RATIO
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), beyond
