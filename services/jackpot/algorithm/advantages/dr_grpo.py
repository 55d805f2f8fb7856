"""Dr. GRPO: differences from the group's mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from jackpot.algorithm.advantages.base import Advantage
from jackpot.algorithm.advantages.grpo import group_advantages

if TYPE_CHECKING:
    from torch import Tensor


class DrGrpoAdvantage(Advantage):
    """reward − group mean (Dr. GRPO)."""

    name: Literal["dr_grpo"] = "dr_grpo"

    def estimate(self, rewards: Tensor, group_index: Tensor, num_tokens: Tensor) -> Tensor:
        """reward − mean of the group."""
        return group_advantages(rewards, group_index, normalize_std=False)
