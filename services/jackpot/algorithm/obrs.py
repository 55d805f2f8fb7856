"""Optimal budgeted rejection sampling of single tokens (paper §3, §4.1; Algorithm 1, lines 15 to 26)."""

from __future__ import annotations

import math
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

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
