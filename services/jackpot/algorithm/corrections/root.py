"""A trial: F(s) = √s."""

from __future__ import annotations

from typing import Literal

from jackpot.algorithm.corrections.correction import Correction, SampledTokens, Weights, target_ratio


class RootCorrection(Correction):
    """F(s) = √s: halfway, in logarithms, between no correction and importance sampling."""

    name: Literal["root"] = "root"

    def weights(self, tokens: SampledTokens) -> Weights:
        """√s."""
        ratio, beyond = target_ratio(tokens.target_logprobs, tokens.actor_logprobs)
        return Weights(value=ratio.sqrt(), raw=ratio, clipped=beyond)
