"""REINFORCE++: rewards whitened over the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from jackpot.algorithm.advantages.base import Advantage

if TYPE_CHECKING:
    from torch import Tensor


class ReinforcePlusPlusAdvantage(Advantage):
    """Rewards whitened over the batch's tokens, without groups (REINFORCE++)."""

    name: Literal["reinforce_plus_plus"] = "reinforce_plus_plus"

    def estimate(self, rewards: Tensor, group_index: Tensor, num_tokens: Tensor) -> Tensor:
        """(reward − mean) / standard deviation of the batch."""
        return whitened(rewards, num_tokens)


def whitened(values: Tensor, num_tokens: Tensor, *, eps: float = 1e-8) -> Tensor:
    """(value − mean) / √(variance + eps), both over the batch's tokens; REINFORCE++.

    Args:
        values: [trajectories]; each token has the value of its trajectory.
        num_tokens: [trajectories].
        eps: keeps the quotient bounded.

    Returns:
        [trajectories]; exactly zero if all values are equal.
    """
    flat, weights = values.detach().double(), num_tokens.double()
    total = weights.sum().clamp(min=1)
    if flat.numel() == 0 or flat.min() == flat.max():
        return values.new_zeros(values.shape)
    centred = flat - (flat * weights).sum() / total
    variance = (centred.square() * weights).sum() / (total - 1).clamp(min=1)
    return (centred * (variance + eps).rsqrt()).to(values.dtype)
