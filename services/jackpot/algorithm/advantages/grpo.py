"""GRPO: differences from the group's mean, divided by the group's standard deviation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from jackpot.algorithm.advantages.base import Advantage

if TYPE_CHECKING:
    from torch import Tensor


class GrpoAdvantage(Advantage):
    """(reward − group mean) / group standard deviation; the paper's."""

    name: Literal["grpo"] = "grpo"
    normalize_std: bool = True
    """false keeps the plain differences, as ``dr_grpo`` does."""

    def estimate(self, rewards: Tensor, group_index: Tensor, num_tokens: Tensor) -> Tensor:
        """(reward − mean) / standard deviation of the group."""
        return group_advantages(rewards, group_index, normalize_std=self.normalize_std)


def group_advantages(
    rewards: Tensor, group_index: Tensor | None = None, *, normalize_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """(reward − group mean) / (group standard deviation + eps).

    Args:
        rewards: [groups, n], or [trajectories] with ``group_index``.
        group_index: [trajectories] int64, the group of each; groups may differ in size.
        normalize_std: False keeps the plain differences (Dr. GRPO).
        eps: keeps the quotient bounded if rewards hardly differ.

    Returns:
        Same shape and dtype as ``rewards``. Exactly zero in a group whose rewards are all equal, including a group of
        one trajectory: rounding must not become a gradient there.

    Raises:
        ValueError: one-dimensional rewards without ``group_index``, or the reverse.
    """
    import torch

    if (rewards.dim() == 2) != (group_index is None) or rewards.dim() not in (1, 2):
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} go with a group index only if one-dimensional")
    if group_index is None:
        group_index = torch.arange(len(rewards), device=rewards.device).repeat_interleave(rewards.shape[1])
    flat = rewards.detach().double().flatten()
    num_groups = int(group_index.max()) + 1 if group_index.numel() else 0
    counts = torch.bincount(group_index, minlength=num_groups).double()
    centred = flat - (_group_sums(flat, group_index, num_groups) / counts)[group_index]
    if normalize_std:
        variance = _group_sums(centred.square(), group_index, num_groups) / (counts - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + eps)[group_index]
    advantages = centred.masked_fill(_all_equal(flat, group_index, num_groups)[group_index], 0.0)
    return advantages.view_as(rewards).to(rewards.dtype)


def _group_sums(values: Tensor, group_index: Tensor, num_groups: int) -> Tensor:
    return values.new_zeros(num_groups).index_add_(0, group_index, values)


def _all_equal(values: Tensor, group_index: Tensor, num_groups: int) -> Tensor:
    least = values.new_zeros(num_groups).scatter_reduce(0, group_index, values, "amin", include_self=False)
    most = values.new_zeros(num_groups).scatter_reduce(0, group_index, values, "amax", include_self=False)
    return least == most
