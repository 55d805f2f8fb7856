"""Groups as flat arrays of completion tokens, and the runs of tokens that a model is asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from jackpot.trajectory import Group, Trajectory


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Tokens [start, end) of one trajectory, and where they lie among the N tokens of a call."""

    prompt_token_ids: NDArray[np.uint32]  # [P]
    trajectory: Trajectory
    start: int
    end: int
    offset: int  # place of the trajectory's first token among the N

    @property
    def num_inputs(self) -> int:
        """What the model has to read: everything before the run's last token."""
        return len(self.prompt_token_ids) + self.end - 1

    @property
    def num_known(self) -> int:
        """How many tokens stand before the run's first."""
        return len(self.prompt_token_ids) + self.start

    def input_ids(self) -> NDArray[np.uint32]:
        """Everything up to the end of the run, [P + end]. What comes after it cannot matter."""
        return np.concatenate([self.prompt_token_ids, self.trajectory.token_ids[: self.end]])

    def places(self) -> Tensor:
        """Places of the run's tokens among the N, [end − start]."""
        return torch.arange(self.offset + self.start, self.offset + self.end)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FlatTokens:
    """The N completion tokens of trajectories with one temperature and one k, one trajectory after the other."""

    runs: tuple[Run, ...]  # whole trajectories
    token_ids: Tensor  # [N] int64
    actor_logprobs: Tensor  # [N], log p_inf
    topk_ids: Tensor  # [N, k] int64; k = 0 where nothing asks for them
    topk_logprobs: Tensor  # [N, k]

    def __len__(self) -> int:
        return len(self.token_ids)


def lay_out(members: Sequence[tuple[Group, Trajectory]]) -> tuple[Run, ...]:
    """Whole trajectories, one after the other."""
    offsets = np.cumsum([0, *(trajectory.num_tokens for _, trajectory in members)]).tolist()
    return tuple(
        Run(group.prompt_token_ids, trajectory, 0, trajectory.num_tokens, offset)
        for (group, trajectory), offset in zip(members, offsets, strict=False)
    )


def by_version(runs: Sequence[Run]) -> dict[int, list[Run]]:
    """What each weight version sampled."""
    found: dict[int, list[Run]] = {}
    for run in runs:
        for span in run.trajectory.version_spans:
            part = Run(run.prompt_token_ids, run.trajectory, span.start, span.end, run.offset)
            found.setdefault(span.version, []).append(part)
    return found


def flatten(members: Sequence[tuple[Group, Trajectory]], device: torch.device, *, with_topk: bool) -> FlatTokens:
    """Lay trajectories of one temperature and one k out one after the other."""
    trajectories = [trajectory for _, trajectory in members]

    def flat(arrays: Sequence[NDArray[np.generic]], dtype: DTypeLike) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays).astype(dtype)).to(device)

    ids = [t.topk_ids for t in trajectories if with_topk and t.topk_ids is not None]
    logprobs = [t.topk_logprobs for t in trajectories if with_topk and t.topk_logprobs is not None]
    none = np.zeros((sum(trajectory.num_tokens for trajectory in trajectories), 0))
    return FlatTokens(
        runs=lay_out(members),
        token_ids=flat([t.token_ids for t in trajectories], np.int64),
        actor_logprobs=flat([t.actor_logprobs for t in trajectories], np.float32),
        topk_ids=flat(ids or [none], np.int64),
        topk_logprobs=flat(logprobs or [none], np.float32),
    )
