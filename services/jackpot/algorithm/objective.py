"""Token losses of policy and actor (paper eq. 5 and 6), as sums over tokens.

Each token's loss is multiplied by its share of the whole batch's loss (:func:`token_shares`). The split into
micro-batches therefore does not matter: their sums add up to the batch's loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from jackpot.algorithm.corrections.tis import tis_weights


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TokenLoss:
    """The sum of token losses, which carries the gradient, and counts, which do not. All scalars."""

    loss_sum: Tensor
    num_active: Tensor  # int64, tokens with a mask above zero; the counts below are among them
    num_clipped_low: Tensor  # int64, r < 1 − clip_low and A < 0: the clip removes their gradient
    num_clipped_high: Tensor  # int64, r > 1 + clip_high and A > 0: likewise
    num_dual_clipped: Tensor  # int64, r > dual_clip and A < 0: likewise
    num_nonfinite: Tensor  # int64, tokens whose loss is not finite; the sum includes them and is then not finite


def token_denominator(mask: Tensor, denominator: Literal["accepted", "all"]) -> Tensor:
    """The divisor of the sum of a batch's token losses; paper §4.1, eq. 5.

    At one position ``accepted`` makes the quotient an estimate of the expectation under p'_inf, where
    E[p_t/p'_inf · f] = E_{p_t}[f], and ``all`` makes it an estimate of Z · E_{p_t}[f]. If Z differs between positions,
    both weigh position i by Zᵢ: ``accepted`` estimates Σ ZᵢEᵢ[f] / Σ Zᵢ and ``all`` Σ ZᵢEᵢ[f] / n. With Z left out of
    the weights, ``all`` estimates Σ Eᵢ[f] / n.

    Args:
        mask: [tokens] of the whole batch: draws (bool or 0/1), or acceptance probabilities when mask = expected,
            whose sum is the expected number of accepted tokens.
        denominator: the tokens to count.

    Returns:
        Float32 scalar. It is 1 where the count is 0: the sum of losses is then 0 as well, and so is the quotient.
    """
    total = mask.detach().double().sum() if denominator == "accepted" else torch.tensor(float(mask.numel()))
    return torch.where(total > 0, total, torch.ones_like(total)).to(device=mask.device, dtype=torch.float32)


def token_shares(
    mask: Tensor,
    sequence_index: Tensor,
    *,
    denominator: Literal["accepted", "all"],
    normalization: Literal["token", "sequence", "constant"] = "token",
    constant_length: int = 1,
) -> Tensor:
    """The factor of each token's loss with which the sum is the batch's loss.

    ``token``: 1/D with D from :func:`token_denominator`. ``sequence``: 1/(n·Dᵢ) with the completion's Dᵢ and the n
    completions whose Dᵢ is not 0 (GRPO). ``constant``: 1/(S·L·κ) with all S completions, a fixed length L and κ the
    batch's D over its number of tokens (Dr. GRPO; κ keeps the meaning of ``accepted``, and is 1 for ``all``).

    Args:
        mask: as for :func:`token_denominator`, [tokens] of the whole batch.
        sequence_index: [tokens] int64, the completion of each token.
        denominator: the tokens that D counts: accepted ones or all.
        normalization: one of the three above.
        constant_length: L.

    Returns:
        [tokens] float32, without gradient. All finite, even if nothing was accepted.
    """
    if normalization == "token":
        return (1.0 / token_denominator(mask, denominator)).expand(mask.shape)
    counted = mask.detach().double() if denominator == "accepted" else torch.ones_like(mask, dtype=torch.float64)
    num_sequences = int(sequence_index.max()) + 1 if sequence_index.numel() else 0
    if normalization == "constant":
        total = num_sequences * constant_length * counted.mean()
        shares = (1.0 / torch.where(total > 0, total, torch.ones_like(total))).expand(mask.shape)
    else:
        totals = counted.new_zeros(num_sequences).index_add_(0, sequence_index, counted)
        per_sequence = torch.where(totals > 0, 1.0 / (totals * (totals > 0).sum()), 0.0)
        shares = per_sequence[sequence_index]
    return shares.float()


def policy_loss_sum(
    policy_logprobs: Tensor,
    reference_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    mask: Tensor,
    *,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None = None,
    shares: Tensor | None = None,
) -> TokenLoss:
    """−Σ SG(ρ) · Mask · min(r·A, clip(r, 1 − ε_low, 1 + ε_high)·A) with r = p_new/p_ref; eq. 5.

    For A < 0 the minimum is unbounded: its magnitude grows with r. ``dual_clip`` applies max(·, c·A) to it (Ye et al.
    2020).

    Args:
        policy_logprobs: log p_new of the sampled tokens, [tokens]; only these receive a gradient.
        reference_logprobs: log p_ref, [tokens].
        advantages: A, [tokens].
        weights: ρ, [tokens].
        mask: [tokens], bool or acceptance probabilities. A token with mask 0 contributes nothing,
            whatever its other values are.
        clip_low: ε below; None for no lower clip.
        clip_high: ε above; None for no upper clip.
        dual_clip: c > 1; None for no bound on the loss of a token with A < 0.
        shares: of :func:`token_shares`, [tokens]; None for a plain sum.
    """
    active = mask.detach() > 0
    # Selected before the exponential: 0 × inf would be nan, and a masked nan would still spoil the gradient.
    log_ratio = torch.where(active, policy_logprobs - reference_logprobs.detach(), 0.0)
    advantages = advantages.detach()
    dual_clipped = torch.zeros_like(active)
    if dual_clip is not None:
        # Also before the exponential: e^89 is infinite in float32, and its gradient is nan.
        dual_clipped = active & (advantages < 0) & (log_ratio.detach() > math.log(dual_clip))
        log_ratio = log_ratio.masked_fill(dual_clipped, math.log(dual_clip))
    ratio = log_ratio.exp()
    low = 0.0 if clip_low is None else 1.0 - clip_low
    high = torch.inf if clip_high is None else 1.0 + clip_high
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(min=low, max=high) * advantages)
    coefficients = torch.where(active, weights.detach() * mask.detach(), 0.0)
    losses = -coefficients * surrogate
    if shares is not None:
        losses = losses * shares
    return TokenLoss(
        loss_sum=losses.sum(),
        num_active=active.sum(),
        num_clipped_low=(active & (ratio.detach() < low) & (advantages < 0)).sum(),
        num_clipped_high=(active & (ratio.detach() > high) & (advantages > 0)).sum(),
        num_dual_clipped=dual_clipped.sum(),
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
    dual_clip: float | None = None,
    shares: Tensor | None = None,
) -> TokenLoss:
    """L_ppo(ω) = −Σ SG(min(p_ω,ref/p_inf, C)) · min(r·A, clip(r)·A) with r = p_ω/p_ω,ref; eq. 6. No OBRS.

    Args:
        actor_logprobs: log p_ω of the sampled tokens, [tokens]; carries the gradient.
        actor_reference_logprobs: log p_ω when the batch's first optimizer step began, [tokens].
        sampled_logprobs: log p_inf as sampled, [tokens]; differs from the former only by staleness and numerics.
        advantages: A, [tokens].
        cap: C > 0.
        clip_low: ε below, or None.
        clip_high: ε above, or None.
        dual_clip: as :func:`policy_loss_sum`.
        shares: of :func:`token_shares`, [tokens]; None for a plain sum.
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
        dual_clip=dual_clip,
        shares=shares,
    )


MAX_KL_LOG_RATIO = 10.0
"""log(p_initial/p_new) is cut at this value, a factor of 22,000, before it is squared or exponentiated. Without the cut
one token could outweigh the batch's rewards, and k3 would report 7e10 nats for a log-ratio of 25."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class KlEstimates:
    """KL(p_new ‖ p_initial) estimated at each sampled token, in nats."""

    value: Tensor  # [tokens]; carries the gradient
    clipped: Tensor  # [tokens] bool, where the log-ratio was cut at ± MAX_KL_LOG_RATIO


def kl_penalty(
    policy_logprobs: Tensor, initial_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"] = "k3"
) -> KlEstimates:
    """KL(p_new ‖ p_initial) estimated at each sampled token, with r = p_initial/p_new; in nats.

    k1 = −log r; k2 = ½ (log r)²; k3 = r − 1 − log r. The mean over p_new of k1 and of k3 is the KL; k2 is biased.

    Every estimator has the gradient of k2, −log r · ∇log p_new, whose mean over p_new is ∇KL(p_new ‖ p_initial). The
    gradient of k1 would have mean zero, and that of k3 would be ∇KL(p_initial ‖ p_new): unbounded, and of another
    divergence.

    Args:
        policy_logprobs: log p_new, [tokens]; carries the gradient.
        initial_logprobs: log p_initial, [tokens].
        estimator: which of these is the value.
    """
    log_ratio = initial_logprobs.detach() - policy_logprobs.detach()
    bounded = log_ratio.clamp(-MAX_KL_LOG_RATIO, MAX_KL_LOG_RATIO)
    match estimator:
        case "k1":
            value = -bounded
        case "k2":
            value = 0.5 * bounded.square()
        case "k3":
            value = torch.expm1(bounded) - bounded
    slope = -bounded * policy_logprobs
    return KlEstimates(value=value + (slope - slope.detach()), clipped=log_ratio.abs() > MAX_KL_LOG_RATIO)
