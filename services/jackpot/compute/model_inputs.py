"""Checks whether the policy can score a group. numpy only: the orchestrator checks, too."""

from __future__ import annotations

import numpy as np

from jackpot.errors import PayloadError
from jackpot.trajectory import Group, Trajectory


def check_group(group: Group, vocabulary: int, *, with_topk: bool) -> None:
    """Refuse a group that a model cannot score, before it reaches a device, where it could crash.

    Raises:
        PayloadError: names the trajectory and what is wrong with it.
    """
    if len(group.prompt_token_ids) == 0 or group.prompt_token_ids.max() >= vocabulary:
        raise PayloadError(
            f"group {group.group_id}: its prompt is empty or has ids beyond the vocabulary, {vocabulary}."
        )
    if not (np.isfinite(group.temperature) and group.temperature > 0):
        raise PayloadError(f"group {group.group_id}: temperature {group.temperature} is not positive.")
    for trajectory in group.trajectories:
        if problem := _problem(trajectory, vocabulary, with_topk):
            raise PayloadError(f"trajectory {trajectory.trajectory_id}: {problem}.")


def _problem(trajectory: Trajectory, vocabulary: int, with_topk: bool) -> str | None:
    if trajectory.num_tokens == 0 or trajectory.token_ids.max() >= vocabulary:
        return f"it has no tokens, or ids beyond the vocabulary, {vocabulary}"
    if not np.isfinite(trajectory.actor_logprobs).all():
        return "the actor's log-probabilities are not finite"
    if not with_topk:
        return None
    if trajectory.topk_ids is None or trajectory.topk_logprobs is None or trajectory.topk_ids.shape[1] == 0:
        return "it lacks the actor's most probable tokens. Ask the rollout service for top_logprobs"
    if trajectory.topk_ids.max() >= vocabulary or np.isnan(trajectory.topk_logprobs).any():
        return f"the actor's most probable tokens are beyond the vocabulary, {vocabulary}, or have no log-probability"
    return None
