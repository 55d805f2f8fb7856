"""Optimal budgeted rejection sampling of single tokens (paper §3, §4.1; Algorithm 1, lines 15 to 26)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from jackpot.algorithm.correction import Weights
from jackpot.trajectory import seeded_as


def acceptance_probs(target_logprobs: Tensor, actor_logprobs: Tensor, obrs_lambda: float) -> Tensor:
    """a(x) = min(1, p_t(x) / (λ p_inf(x))); paper §3.

    Args:
        target_logprobs: log p_t of the sampled tokens, any shape, in nats.
        actor_logprobs: log p_inf of the same tokens, same shape.
        obrs_lambda: λ > 0; larger rejects more and aligns more.

    Returns:
        Probabilities in [0, 1], same shape, without gradient. Not finite only where an input is not.
    """
    log_ratio = target_logprobs.detach() - actor_logprobs.detach()
    return torch.clamp(log_ratio - math.log(obrs_lambda), max=0.0).exp()


def acceptance_uniforms(job_seed: int, trajectory_id: str, num_tokens: int) -> Tensor:
    """The uniform numbers in [0, 1) that a trajectory's acceptance is drawn with: [num_tokens] float64.

    A function of the seed and of slot, epoch, prompt, attempt and index of the trajectory, so that it gets the same
    mask on any worker, however often it is delivered, and in any job of that seed. Those of the first n tokens do not
    depend on how many follow.
    """
    key = blake2b(
        f"{job_seed}\0{seeded_as(trajectory_id)}".encode(), digest_size=16, person=b"obrs-acceptance"
    ).digest()
    # The raw stream of a bit generator is stable across numpy versions; what Generator makes of it need not be.
    raw = np.random.Philox(key=np.frombuffer(key, dtype="<u8")).random_raw(num_tokens)
    return torch.from_numpy((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def acceptance_mask(acceptance_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Mask ~ Bernoulli(a): True where the token is accepted; bool, same shape. a = 1 always accepts, 0 never."""
    return uniforms.to(acceptance_probs.device) < acceptance_probs.detach()


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class JackpotWeights(Weights):
    """ρ of Algorithm 1. ``raw`` is w_obrs before c1, ``clipped`` says where c1 cut it."""

    clipped_c2: Tensor  # [tokens] bool, where p_ref/p_t was cut at c2; all False with target = reference


def jackpot_weights(
    target_logprobs: Tensor,
    actor_logprobs: Tensor,
    normalizer: Tensor,
    *,
    obrs_lambda: float | Tensor,
    c1: float,
    reference_logprobs: Tensor | None = None,
    c2: float | None = None,
) -> JackpotWeights:
    """ρ = min(Z · max(λ, p_t/p_inf), c1) · min(p_ref/p_t, c2); Algorithm 1, eq. 5.

    Meant for accepted tokens; a rejected one has a weight too, which its mask takes away.

    Args:
        target_logprobs: log p_t of the sampled tokens, [tokens].
        actor_logprobs: log p_inf, [tokens].
        normalizer: Z, [tokens].
        obrs_lambda: λ > 0; [tokens] where it differs between them, as in a batch that spans a change of λ.
        c1: upper clip of w_obrs; ``math.inf`` for none.
        reference_logprobs: log p_ref, [tokens], when the target is the policy; None when it is the reference
            itself, whose second factor is 1.
        c2: upper clip of p_ref/p_t; None for none.

    Returns:
        The weights, without gradient.
    """
    log_ratio = target_logprobs.detach() - actor_logprobs.detach()
    log_lambda = torch.as_tensor(obrs_lambda, dtype=log_ratio.dtype, device=log_ratio.device).log()
    raw = normalizer.detach() * torch.maximum(log_ratio, log_lambda).exp()
    value = torch.clamp(raw, max=c1)
    clipped_c2 = torch.zeros_like(raw, dtype=torch.bool)
    if reference_logprobs is not None:
        reference_ratio = (reference_logprobs.detach() - target_logprobs.detach()).exp()
        limit = math.inf if c2 is None else c2
        clipped_c2 = reference_ratio > limit
        value = value * torch.clamp(reference_ratio, max=limit)
    return JackpotWeights(value=value, raw=raw, clipped=raw > c1, clipped_c2=clipped_c2)
