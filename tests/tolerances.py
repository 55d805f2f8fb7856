"""How far a sum in floating point may lie from the exact one: where the numeric tests' tolerances come from.

A processor, a thread count or a BLAS changes the order of a sum, fuses a product into it or does not, and has an exp of
its own. Each of these stays within the bound below, so a test that allows it passes everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

# Chance that one sum exceeds the probabilistic bound: 2·exp(−λ²/2) = 3e-8.
LAMBDA = 6.0


def unit_roundoff(dtype: torch.dtype = torch.float32) -> float:
    """u: the largest relative error of one rounding, 6e-8 in float32 and 2⁻⁸ in bfloat16."""
    return torch.finfo(dtype).eps / 2


def gamma(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """The relative error of ``terms`` roundings one after the other, whatever their order.

    In the worst case n·u / (1 − n·u) (Higham, *Accuracy and Stability of Numerical Algorithms*, lemma 3.1). Roundings
    of long sums partly cancel: λ·√n·u with the chance that ``LAMBDA`` states (Higham and Mary, *A New Approach to
    Probabilistic Rounding Error Analysis*, 2019, theorem 2.4). The smaller of the two.
    """
    u = unit_roundoff(dtype)
    if terms < 1 or terms * u >= 1:
        raise ValueError(f"terms = {terms}: no bound holds. Give 1 to {int(1 / u) - 1} for {dtype}")
    return min(terms * u / (1 - terms * u), math.expm1(LAMBDA * math.sqrt(terms) * u))


def rounding(terms: int, magnitude: float | torch.Tensor, dtype: torch.dtype = torch.float32) -> float:
    """The absolute error of a sum of ``terms`` products whose absolute values add up to ``magnitude``, at most.

    Of a tensor the largest element counts. Two computed sums differ by twice this.
    """
    largest = float(magnitude.detach().abs().max()) if isinstance(magnitude, torch.Tensor) else abs(magnitude)
    return gamma(terms, dtype) * largest


def model_rounding(config: Any, tokens: int, magnitude: float | torch.Tensor, *, backward: bool = False) -> float:
    """How far two float32 computations of a decoder's states, or of its gradients, may lie apart.

    ``config`` is Hugging Face's. The sums that a value passes through, one after the other: in each layer two norms,
    the projections to queries and keys, their products, the attention to ``tokens``, its output's projection, and the
    two of the feed-forward part. A gradient passes as many on its way back. ``magnitude`` is that of the result.
    """
    hidden = config.hidden_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    terms = config.num_hidden_layers * (
        2 * hidden + hidden + head + tokens + hidden + hidden + config.intermediate_size
    )
    return 2 * rounding(2 * terms if backward else terms, magnitude)


def logprob_rounding(hidden: torch.Tensor, head: Any, temperature: float) -> float:
    """How far log p of an output layer lies from the exact one, in float32.

    A logit is ``hidden.shape[-1]`` products, then bias, scale, cap and temperature; its row's sum of exponentials has a
    term for each token of the vocabulary. ``head`` is an ``OutputHead`` whose scale is at most 1.
    """
    with torch.no_grad():
        logits = hidden.float().abs() @ head.weight.float().abs().T
        if head.bias is not None:
            logits += head.bias.float().abs()
        return rounding(hidden.shape[-1] + 4, logits / temperature) + gamma(len(head.weight))


def figures_rounding(expected: Mapping[str, float], log_error: float) -> dict[str, float]:
    """How far a step's figures may lie from ``expected``, for ``pytest.approx``, if log p errs by ``log_error``.

    A weight is a ratio of two probabilities times Z, so that its relative error is three times that of one. The
    effective sample size has it four times; no other figure has more. Terms like s·log s − s + 1 with s = p_t/p_inf
    cancel: an error 2·``log_error`` of log s is multiplied by s·|log s|, whose mean the row tells (s·log s ≥ −1/e), and
    so is that of w in the KL after rejection.
    """
    magnitude = 1.0
    if "rollout_corr/kl_before" in expected:
        mean_less_one = expected["rollout_corr/k3_kl"] - expected["rollout_corr/kl"]  # of s
        magnitude = max(1.0, expected["rollout_corr/kl_before"] + mean_less_one + 2 / math.e)
    return {"rel": 12 * log_error, "abs": 4 * log_error * magnitude}
