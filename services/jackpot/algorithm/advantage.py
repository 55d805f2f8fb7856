"""Group advantages (GRPO; paper §4.2 uses them for policy and actor alike)."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor, group_index: Tensor | None = None, *, normalize_std: bool = True, eps: float = 1e-6
) -> Tensor:
    """(reward − group mean) / (group standard deviation + eps).

    Args:
        rewards: [groups, n], or [trajectories] with ``group_index``.
        group_index: [trajectories] int64, the group of each; groups may differ in size.
        normalize_std: False leaves the differences as they are (Dr. GRPO).
        eps: keeps the quotient bounded where rewards hardly differ.

    Returns:
        Same shape and dtype as ``rewards``. Exactly zero in a group whose rewards are all equal, also in one of a
        single trajectory: rounding must not become a gradient there.

    Raises:
        ValueError: one-dimensional rewards without ``group_index``, or the reverse.
    """
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
