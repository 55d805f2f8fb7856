"""Corrections without rejection: F on s = p_ref/p_inf. One function a correction, all of one form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def tis_weights(reference_logprobs: Tensor, actor_logprobs: Tensor, *, cap: float) -> Weights:
    """F(s) = min(s, C), truncated importance sampling (Flash-RL, LlamaRL).

    Args:
        reference_logprobs: log p_ref of the sampled tokens, [tokens].
        actor_logprobs: log p_inf, [tokens].
        cap: C > 0.
    """
    raw = (reference_logprobs.detach() - actor_logprobs.detach()).exp()
    return Weights(value=torch.clamp(raw, max=cap), raw=raw, clipped=raw > cap)
