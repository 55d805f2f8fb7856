"""The acceptance rate as the knob: λ found for it on each batch (theorem 3.4 says there is one). Beyond the paper.

mean(min(1, s/λ)) over sampled tokens, s = p_t/p_inf, is an unbiased estimate of the acceptance rate at λ and falls
monotonically with λ: the λ of a wanted rate is where bisection ends. From max s on what is accepted follows p_t
exactly, and a larger λ would reject more for nothing: the rate is a floor, which a small mismatch does not use up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jackpot.algorithm.obrs import acceptance_probs

_BISECTIONS = 50  # each halves the interval in log λ: from any sensible bounds to below the rounding of float64


def solve_lambda(
    target_logprobs: Tensor, actor_logprobs: Tensor, acceptance_rate: float, *, lower: float, upper: float
) -> float:
    """The λ in [lower, upper], at most max s, at which these tokens are accepted at ``acceptance_rate`` on average.

    Args:
        target_logprobs: log p_t of the sampled tokens, [tokens]; all of them, not the accepted ones alone.
        actor_logprobs: log p_inf of the same tokens.
        acceptance_rate: in (0, 1]. At 1 any λ up to the smallest ratio would do; the largest such is returned.
        lower: least λ, > 0; returned where even it accepts less.
        upper: greatest λ; where even it, or :func:`greatest_lambda` below it, accepts more, that is returned.
    """
    target, actor = target_logprobs.detach().double(), actor_logprobs.detach().double()
    finite = target.isfinite() & actor.isfinite()
    target, actor = target[finite], actor[finite]

    def accepts_enough(log_lambda: float) -> bool:
        # A rate of exactly 1 is a mean of ones, up to rounding.
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
    """max s over these tokens, [tokens] each, within [lower, upper]: where rejection has aligned all that it can.

    ``upper`` for no token with a finite score.
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
    """mean(min(1, s/λ)): the acceptance rate that a λ would have had on these tokens; 1 for no token."""
    if not target_logprobs.numel():
        return 1.0
    return float(torch.mean(acceptance_probs(target_logprobs.double(), actor_logprobs.double(), obrs_lambda)))
