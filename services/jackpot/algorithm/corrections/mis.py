"""Masked importance sampling of whole completions: F = Π s up to a cap, else 0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from jackpot.algorithm.corrections.base import Correction, SampledTokens, Weights, masked_outside, target_ratio
from jackpot.section import NonNegativeFloat, PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor


class MisCorrection(Correction):
    """Masked importance sampling of whole completions: F = Π s where Π s ≤ C, else 0 (TRL's ``sequence_mask``)."""

    name: Literal["mis"] = "mis"
    cap: PositiveFloat = 2.0
    """C. 2, as for ``tis``, so that the two differ in only one respect."""
    low: NonNegativeFloat = 0.0
    """Completions with a smaller Π s get weight 0 too. 0 keeps them: their weights are bounded anyway."""

    @model_validator(mode="after")
    def _ordered(self) -> MisCorrection:
        if self.low >= self.cap:
            raise ValueError(f"low = {self.low:g} is not below cap = {self.cap:g}. Lower low")
        return self

    def weights(self, tokens: SampledTokens) -> Weights:
        """Π s if it is in [low, C], else 0."""
        return mis_weights(
            tokens.target_logprobs,
            tokens.actor_logprobs,
            sequence_index=tokens.sequence_index,
            cap=self.cap,
            low=self.low,
        )


def mis_weights(
    target_logprobs: Tensor, actor_logprobs: Tensor, *, sequence_index: Tensor, cap: float, low: float = 0.0
) -> Weights:
    """F = Π s where low ≤ Π s ≤ C, else 0, with the product over the completion; masked importance sampling.

    Args:
        target_logprobs: log p_t of the sampled tokens, [tokens].
        actor_logprobs: log p_inf, [tokens].
        sequence_index: [tokens] int64, the completion of each token.
        cap: C > 0.
        low: completions below get weight 0 too.
    """
    return masked_outside(*target_ratio(target_logprobs, actor_logprobs, sequence_index), low, cap)
