"""Truncated importance sampling: F(s) = min(s, C)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from jackpot.algorithm.corrections.base import Correction, Level, SampledTokens, Weights, target_ratio
from jackpot.section import PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor


class TisCorrection(Correction):
    """Truncated importance sampling: F(s) = min(s, C) (Flash-RL, LlamaRL)."""

    compared_in_demo: ClassVar[bool] = True

    name: Literal["tis"] = "tis"
    cap: PositiveFloat = 2.0
    """C. 2 is Flash-RL's value and verl's ``rollout_is_threshold``; TRL calls it the importance sampling cap."""
    level: Level = "token"
    """``token`` truncates each token's s; ``sequence`` truncates the product of s over the completion."""

    def weights(self, tokens: SampledTokens) -> Weights:
        """min(s, C), or min(Π s, C) over the completion."""
        sequences = tokens.sequence_index if self.level == "sequence" else None
        return tis_weights(tokens.target_logprobs, tokens.actor_logprobs, cap=self.cap, sequence_index=sequences)


def tis_weights(
    target_logprobs: Tensor, actor_logprobs: Tensor, *, cap: float, sequence_index: Tensor | None = None
) -> Weights:
    """F(s) = min(s, C), truncated importance sampling (Flash-RL, LlamaRL).

    Args:
        target_logprobs: log p_t of the sampled tokens, [tokens].
        actor_logprobs: log p_inf, [tokens].
        cap: C > 0.
        sequence_index: as for :func:`target_ratio`.
    """
    raw, beyond = target_ratio(target_logprobs, actor_logprobs, sequence_index)
    return Weights(value=raw.clamp(max=cap), raw=raw, clipped=beyond | (raw > cap))
