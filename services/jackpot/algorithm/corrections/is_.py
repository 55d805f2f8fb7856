"""Importance sampling without a bound: F(s) = s."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from jackpot.algorithm.corrections.base import Correction, Level, SampledTokens, Weights, target_ratio

if TYPE_CHECKING:
    from torch import Tensor


class IsCorrection(Correction):
    """Importance sampling without a bound: F(s) = s (AReaL). Unbiased, with unbounded variance."""

    name: Literal["is"] = "is"
    level: Level = "token"
    """``token`` uses each token's s = p_ref/p_inf. ``sequence`` uses the product of s over the completion at each of
    its tokens, which is unbiased for the whole completion but practically useless except for short ones."""

    def weights(self, tokens: SampledTokens) -> Weights:
        """s, or Π s over the completion."""
        sequences = tokens.sequence_index if self.level == "sequence" else None
        return is_weights(tokens.target_logprobs, tokens.actor_logprobs, sequence_index=sequences)


def is_weights(target_logprobs: Tensor, actor_logprobs: Tensor, *, sequence_index: Tensor | None = None) -> Weights:
    """F(s) = s, importance sampling (AReaL). Arguments as :func:`target_ratio`."""
    raw, beyond = target_ratio(target_logprobs, actor_logprobs, sequence_index)
    return Weights(value=raw, raw=raw, clipped=beyond)
