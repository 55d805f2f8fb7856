"""Which of a call's trajectories this rank passes through the models, and how many passes it must make for the others'
sake: collectives of sharded models need all ranks in every pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jackpot.compute.ranks.group import Ranks
from jackpot.compute.ranks.partition import balanced_shares
from jackpot.scoring.passes import PassSettings, num_passes
from jackpot.scoring.tokens import Run, by_version, lay_out
from jackpot.trajectory import Group, Trajectory


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """One rank's part of the trajectories of a call, which have N tokens in all."""

    members: tuple[tuple[Group, Trajectory], ...]  # this rank's; may be none
    places: Tensor  # [n] int64: where their tokens lie among the N
    policy_passes: int  # that the rank with the most passes makes through the policy
    actor_passes: Mapping[int, int]  # the same through the actor, by version, oldest first


def rank_share(members: Sequence[tuple[Group, Trajectory]], settings: PassSettings, ranks: Ranks) -> Share:
    """This rank's share. A function of the trajectories alone: every rank knows that of every other.

    Args:
        members: all trajectories of the call.
        settings: how many tokens go together.
        ranks: among whom they are divided, by tokens.
    """
    runs = lay_out(members)
    shares = balanced_shares([run.num_inputs for run in runs], ranks.size)
    passes = [_passes([runs[index] for index in share], settings) for share in shares]
    versions = sorted({version for _, by_actor in passes for version in by_actor})
    own = shares[ranks.rank]
    return Share(
        members=tuple(members[index] for index in own),
        places=torch.cat([torch.zeros(0, dtype=torch.int64), *(runs[index].places() for index in own)]),
        policy_passes=max(through_policy for through_policy, _ in passes),
        actor_passes={version: max(by_actor.get(version, 0) for _, by_actor in passes) for version in versions},
    )


def _passes(runs: Sequence[Run], settings: PassSettings) -> tuple[int, dict[int, int]]:
    by_actor = {version: num_passes(own, settings.apart()) for version, own in by_version(runs).items()}
    return num_passes(runs, settings), by_actor
