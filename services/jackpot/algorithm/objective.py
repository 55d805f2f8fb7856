"""Token losses of policy and actor (paper eq. 5 and 6), as sums: whoever adds micro-batches up divides once.

A loss is ``loss_sum / denominator`` with the denominator of the whole batch, so that the way a batch is split into
micro-batches changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from jackpot.algorithm.correction import tis_weights


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TokenLoss:
    """The sum of token losses, which carries the gradient, and counts that do not. All scalars."""

    loss_sum: Tensor
    num_active: Tensor  # int64, tokens with a mask above zero; the counts below are among them
    num_clipped_low: Tensor  # int64, r < 1 − clip_low and A < 0: the clip takes their gradient
    num_clipped_high: Tensor  # int64, r > 1 + clip_high and A > 0: likewise
    num_nonfinite: Tensor  # int64, tokens whose loss is not finite; they are in the sum, and make it so too


def token_denominator(mask: Tensor, denominator: Literal["accepted", "all"]) -> Tensor:
    """What the sum of a batch's token losses is divided by; paper §4.1, eq. 5.

    ``accepted`` makes the quotient an estimate of the expectation under p'_inf, where E[p_t/p'_inf · f] = E_{p_t}[f];
    ``all`` estimates Z · E_{p_t}[f].

    Args:
        mask: [tokens] of the whole batch: draws (bool or 0/1), or acceptance probabilities when mask = expected,
            whose sum is the expected number of accepted tokens.
        denominator: which.

    Returns:
        Float32 scalar. 1 instead of 0, for then the sum of losses is 0 as well and the quotient must be 0.
    """
    total = mask.detach().double().sum() if denominator == "accepted" else torch.tensor(float(mask.numel()))
    return torch.where(total > 0, total, torch.ones_like(total)).to(device=mask.device, dtype=torch.float32)


def policy_loss_sum(
    policy_logprobs: Tensor,
    reference_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    mask: Tensor,
    *,
    clip_low: float | None,
    clip_high: float | None,
) -> TokenLoss:
    """−Σ SG(ρ) · Mask · min(r·A, clip(r, 1 − ε_low, 1 + ε_high)·A) with r = p_new/p_ref; eq. 5.

    Args:
        policy_logprobs: log p_new of the sampled tokens, [tokens]; the gradient goes here alone.
        reference_logprobs: log p_ref, [tokens].
        advantages: A, [tokens].
        weights: ρ, [tokens].
        mask: [tokens], bool or acceptance probabilities. A token with mask 0 contributes nothing, whatever its
            other values are.
        clip_low: ε below; None for no lower clip.
        clip_high: ε above; None for no upper clip.
    """
    active = mask.detach() > 0
    # Selected before the exponential: 0 × inf would be nan, and a nan behind a mask still spoils the gradient.
    log_ratio = torch.where(active, policy_logprobs - reference_logprobs.detach(), 0.0)
    advantages = advantages.detach()
    ratio = log_ratio.exp()
    low = 0.0 if clip_low is None else 1.0 - clip_low
    high = torch.inf if clip_high is None else 1.0 + clip_high
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(min=low, max=high) * advantages)
    coefficients = torch.where(active, weights.detach() * mask.detach(), 0.0)
    losses = -coefficients * surrogate
    return TokenLoss(
        loss_sum=losses.sum(),
        num_active=active.sum(),
        num_clipped_low=(active & (ratio.detach() < low) & (advantages < 0)).sum(),
        num_clipped_high=(active & (ratio.detach() > high) & (advantages > 0)).sum(),
        num_nonfinite=(~losses.detach().isfinite()).sum(),
    )


def actor_loss_sum(
    actor_logprobs: Tensor,
    actor_reference_logprobs: Tensor,
    sampled_logprobs: Tensor,
    advantages: Tensor,
    *,
    cap: float,
    clip_low: float | None,
    clip_high: float | None,
) -> TokenLoss:
    """L_ppo(ω) = −Σ SG(min(p_ω,ref/p_inf, C)) · min(r·A, clip(r)·A) with r = p_ω/p_ω,ref; eq. 6. No OBRS.

    Args:
        actor_logprobs: log p_ω of the sampled tokens, [tokens]; carries the gradient.
        actor_reference_logprobs: log p_ω when the batch's first optimizer step began, [tokens].
        sampled_logprobs: log p_inf as sampled, [tokens]; differs from the former by staleness and numerics only.
        advantages: A, [tokens].
        cap: C > 0.
        clip_low: ε below, or None.
        clip_high: ε above, or None.
    """
    weights = tis_weights(actor_reference_logprobs, sampled_logprobs, cap=cap).value
    everything = torch.ones_like(weights)
    return policy_loss_sum(
        actor_logprobs,
        actor_reference_logprobs,
        advantages,
        weights,
        everything,
        clip_low=clip_low,
        clip_high=clip_high,
    )
