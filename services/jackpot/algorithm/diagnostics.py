"""Measures of the mismatch between target and actor, before and after OBRS. No gradients; float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_NORMALIZER = 1e-6  # an estimate Z = 0 at an accepted token would make the KL after OBRS infinite


@dataclass(frozen=True, slots=True, kw_only=True)
class KlEstimate:
    """KL from the target to the tokens' distribution, in nats per token; the mean over the batch's positions."""

    before: float  # KL(p_t ‖ p_inf)
    after: float  # KL(p_t ‖ p'_inf), of accepted tokens


def kl_before_and_after(
    target_logprobs: Tensor, actor_logprobs: Tensor, normalizer: Tensor, obrs_lambda: float | Tensor
) -> KlEstimate:
    """Both KLs from all sampled tokens (accepted or not), each by an unbiased estimate that is never negative.

    With s = p_t/p_inf and w = p_t/p'_inf = Z·max(λ, s): KL before = E[s·log s − s + 1] and KL after
    = E[s·log w − s + a/Z], with expectations over p_inf. The terms added to s·log s and s·log w have mean zero. The
    second estimate is unbiased if Z is exact.

    Args:
        target_logprobs: log p_t of the sampled tokens, [tokens].
        actor_logprobs: log p_inf of the same tokens.
        normalizer: Z, [tokens].
        obrs_lambda: λ, a number or [tokens].
    """
    log_s = (target_logprobs.detach() - actor_logprobs.detach()).double()
    if not log_s.numel():
        return KlEstimate(before=0.0, after=0.0)
    log_lambda = torch.as_tensor(obrs_lambda, dtype=torch.float64, device=log_s.device).log()
    z = normalizer.detach().double().clamp(min=_LEAST_NORMALIZER)
    s, acceptance = log_s.exp(), torch.clamp(log_s - log_lambda, max=0.0).exp()
    before = s * log_s - s + 1.0
    after = s * (z.log() + torch.maximum(log_s, log_lambda)) - s + acceptance / z
    return KlEstimate(before=before.mean().item(), after=after.mean().item())


def exact_kl_before_and_after(
    target_logprobs: Tensor, actor_logprobs: Tensor, obrs_lambda: float
) -> tuple[Tensor, Tensor]:
    """KL(p_t ‖ p_inf) and KL(p_t ‖ p'_inf) at each position from whole rows of both models, [N, vocab] → [N] each.

    With p'_inf = min(p_inf, p_t/λ)/Z: KL after = Σ p_t·(log p_t − min(log p_inf, log p_t − log λ)) + log Z.
    """
    target, actor = target_logprobs.detach(), actor_logprobs.detach()
    accepted = torch.minimum(actor, target - torch.as_tensor(obrs_lambda, dtype=target.dtype).log())
    probabilities = target.exp()
    before = (probabilities * (target - actor)).sum(-1)
    after = (probabilities * (target - accepted)).sum(-1) + accepted.logsumexp(-1)
    return before, after


def effective_sample_ratio(weights: Tensor) -> float:
    """(Σw)² / (N·Σw²): 1 if all weights are equal, 1/N if one token has all the weight, 0 if all weights are 0.

    Args:
        weights: the factor of each token's loss, including its mask, [tokens].
    """
    values = weights.detach().double()
    if not values.any():
        return 0.0
    return (values.sum().square() / (values.square().sum() * len(values))).item()


def ratio_quantiles(target_logprobs: Tensor, actor_logprobs: Tensor, quantiles: Sequence[float]) -> list[float]:
    """Quantiles of p_t/p_inf over sampled tokens, before clipping; nan for no tokens."""
    log_ratio = (target_logprobs.detach() - actor_logprobs.detach()).double()
    if not log_ratio.numel():
        return [float("nan")] * len(quantiles)
    # Sorted here because torch.quantile refuses more than 16 million values.
    ordered = log_ratio.sort().values
    places = torch.tensor(quantiles, dtype=torch.float64) * (len(ordered) - 1)
    return [float(ordered[round(place)].exp()) for place in places.tolist()]
