"""RLOO: differences from the mean of the group's other rewards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from jackpot.algorithm.advantages.base import Advantage
from jackpot.algorithm.advantages.grpo import group_advantages

if TYPE_CHECKING:
    from torch import Tensor


class RlooAdvantage(Advantage):
    """reward − mean of the group's other rewards (RLOO)."""

    name: Literal["rloo"] = "rloo"

    def estimate(self, rewards: Tensor, group_index: Tensor, num_tokens: Tensor) -> Tensor:
        """reward − mean of the group's other rewards."""
        return leave_one_out_advantages(rewards, group_index)


def leave_one_out_advantages(rewards: Tensor, group_index: Tensor) -> Tensor:
    """reward − mean of the group's other rewards = n/(n − 1) · (reward − group mean); RLOO.

    The baseline does not depend on its completion, so the gradient is unbiased. Exactly zero in groups whose rewards
    are all equal and in groups of one.

    Args:
        rewards: [trajectories].
        group_index: [trajectories] int64.
    """
    counts = group_index.bincount()[group_index].double()
    scale = counts / (counts - 1).clamp(min=1)
    return (group_advantages(rewards.double(), group_index, normalize_std=False) * scale).to(rewards.dtype)
