"""Sets the acceptance rate by solving for λ on each batch (theorem 3.4 says that λ exists). Beyond the paper.

With s = p_t/p_inf, mean(min(1, s/λ)) over sampled tokens is an unbiased estimate of the acceptance rate at λ. It falls
monotonically with λ, so bisection finds the λ of a given rate. At λ = max s the accepted tokens follow p_t exactly, and
a larger λ would reject more without benefit. The rate is therefore a floor: with a small mismatch more is accepted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jackpot.algorithm.obrs import acceptance_probs

_BISECTIONS = 50  # each halves the interval in log λ: enough to go from any sensible bounds to below float64 rounding


def solve_lambda(
    target_logprobs: Tensor, actor_logprobs: Tensor, acceptance_rate: float, *, lower: float, upper: float
) -> float:
    """The λ in [lower, upper], at most max s, at which the mean acceptance of these tokens is ``acceptance_rate``.

    Args:
        target_logprobs: log p_t of all sampled tokens, not only the accepted ones, [tokens].
        actor_logprobs: log p_inf of the same tokens.
        acceptance_rate: in (0, 1]. At 1 any λ up to the smallest ratio would do; the largest of these is returned.
        lower: least λ, > 0; returned if even this λ accepts less.
        upper: greatest λ. If it, or a smaller :func:`greatest_lambda`, still accepts more, that λ is returned.
    """
    target, actor = target_logprobs.detach().double(), actor_logprobs.detach().double()
    finite = target.isfinite() & actor.isfinite()
    target, actor = target[finite], actor[finite]

    def accepts_enough(log_lambda: float) -> bool:
        # A rate of exactly 1 is a mean of ones up to rounding.
        return float(acceptance_probs(target, actor, math.exp(log_lambda)).mean()) >= acceptance_rate - 1e-12

    greatest = greatest_lambda(target, actor, lower=lower, upper=upper)
    low, high = math.log(lower), math.log(upper)
    if not len(target) or accepts_enough(math.log(greatest)):
        return greatest
    if not accepts_enough(low):
        return lower
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if accepts_enough(middle) else (low, middle)
    return math.exp(low)


def greatest_lambda(target_logprobs: Tensor, actor_logprobs: Tensor, *, lower: float, upper: float) -> float:
    """max s over these tokens, [tokens] each, limited to [lower, upper]: a larger λ improves alignment no further.

    ``upper`` if no token has a finite score.
    """
    log_ratio = (target_logprobs.detach() - actor_logprobs.detach()).double()
    log_ratio = log_ratio[log_ratio.isfinite()]
    if not log_ratio.numel():
        return upper
    return min(max(math.exp(min(float(log_ratio.max()), math.log(upper))), lower), upper)


def smoothed_lambda(previous: float, solved: float, smoothing: float) -> float:
    """Exponential smoothing of log λ: ``smoothing`` is the weight of the previous value."""
    return math.exp(smoothing * math.log(previous) + (1.0 - smoothing) * math.log(solved))


def acceptance_at(target_logprobs: Tensor, actor_logprobs: Tensor, obrs_lambda: float) -> float:
    """mean(min(1, s/λ)): the acceptance rate of these tokens at λ; 1 for no tokens."""
    if not target_logprobs.numel():
        return 1.0
    return float(torch.mean(acceptance_probs(target_logprobs.double(), actor_logprobs.double(), obrs_lambda)))
