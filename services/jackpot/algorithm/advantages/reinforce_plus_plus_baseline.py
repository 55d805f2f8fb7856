"""REINFORCE++ with a baseline: differences from the group's mean, whitened over the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from jackpot.algorithm.advantages.base import Advantage
from jackpot.algorithm.advantages.grpo import group_advantages
from jackpot.algorithm.advantages.reinforce_plus_plus import whitened

if TYPE_CHECKING:
    from torch import Tensor


class ReinforcePlusPlusBaselineAdvantage(Advantage):
    """reward − group mean, whitened over the batch's tokens (REINFORCE++ with a baseline)."""

    name: Literal["reinforce_plus_plus_baseline"] = "reinforce_plus_plus_baseline"

    def estimate(self, rewards: Tensor, group_index: Tensor, num_tokens: Tensor) -> Tensor:
        """(reward − group mean) / standard deviation of the batch."""
        return whitened(group_advantages(rewards, group_index, normalize_std=False), num_tokens)
