"""Advantages of completions (GRPO's, paper §4.2, for policy and actor alike; and the usual others)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

AdvantageName = Literal["grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]


def estimate_advantages(
    name: AdvantageName, rewards: Tensor, group_index: Tensor, num_tokens: Tensor, *, normalize_std: bool = True
) -> Tensor:
    """The estimator called ``name``.

    Args:
        name: which.
        rewards: [trajectories] of a whole batch.
        group_index: [trajectories] int64, the group of each.
        num_tokens: [trajectories] int64, how many tokens each has; what whitening over the batch weighs by.
        normalize_std: for grpo, whether differences are divided by the group's standard deviation.

    Returns:
        [trajectories], without gradient.
    """
    match name:
        case "grpo":
            return group_advantages(rewards, group_index, normalize_std=normalize_std)
        case "dr_grpo":
            return group_advantages(rewards, group_index, normalize_std=False)
        case "rloo":
            return leave_one_out_advantages(rewards, group_index)
        case "reinforce_plus_plus":
            return whitened(rewards, num_tokens)
        case "reinforce_plus_plus_baseline":
            return whitened(group_advantages(rewards, group_index, normalize_std=False), num_tokens)


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


def leave_one_out_advantages(rewards: Tensor, group_index: Tensor) -> Tensor:
    """reward − mean of the group's other rewards = n/(n − 1) · (reward − group mean); RLOO.

    The baseline does not depend on the completion that it is for, which makes the gradient unbiased. Exactly zero in
    groups whose rewards are all equal and in groups of one.

    Args:
        rewards: [trajectories].
        group_index: [trajectories] int64.
    """
    counts = torch.bincount(group_index)[group_index].double()
    scale = counts / (counts - 1).clamp(min=1)
    return (group_advantages(rewards.double(), group_index, normalize_std=False) * scale).to(rewards.dtype)


def whitened(values: Tensor, num_tokens: Tensor, *, eps: float = 1e-8) -> Tensor:
    """(value − mean) / √(variance + eps), both over the batch's tokens; REINFORCE++.

    Args:
        values: [trajectories], of which each token of a trajectory has that of its trajectory.
        num_tokens: [trajectories].
        eps: keeps the quotient bounded.

    Returns:
        [trajectories]; exactly zero where all values are equal.
    """
    flat, weights = values.detach().double(), num_tokens.double()
    total = weights.sum().clamp(min=1)
    if flat.numel() == 0 or flat.min() == flat.max():
        return torch.zeros_like(values)
    centred = flat - (flat * weights).sum() / total
    variance = (centred.square() * weights).sum() / (total - 1).clamp(min=1)
    return (centred * (variance + eps).rsqrt()).to(values.dtype)


def _group_sums(values: Tensor, group_index: Tensor, num_groups: int) -> Tensor:
    return values.new_zeros(num_groups).index_add_(0, group_index, values)


def _all_equal(values: Tensor, group_index: Tensor, num_groups: int) -> Tensor:
    least = values.new_zeros(num_groups).scatter_reduce(0, group_index, values, "amin", include_self=False)
    most = values.new_zeros(num_groups).scatter_reduce(0, group_index, values, "amax", include_self=False)
    return least == most
