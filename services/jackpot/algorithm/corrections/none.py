"""No correction: F(s) = 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from jackpot.algorithm.corrections.base import Correction, SampledTokens, Weights

if TYPE_CHECKING:
    from torch import Tensor


class NoCorrection(Correction):
    """F(s) = 1: train as if the policy had sampled the trajectories."""

    compared_in_demo: ClassVar[bool] = True

    name: Literal["none"] = "none"

    def weights(self, tokens: SampledTokens) -> Weights:
        """1 for each token."""
        return no_weights(tokens.target_logprobs, tokens.actor_logprobs)


def no_weights(target_logprobs: Tensor, actor_logprobs: Tensor) -> Weights:
    """F(s) = 1. [tokens] each."""
    difference = target_logprobs.detach() - actor_logprobs.detach()
    ones = difference.new_ones(difference.shape)
    return Weights(value=ones, raw=ones, clipped=ones < 0)
