"""Plans the passes of each rank. The plan depends only on the sequences' lengths. numpy only."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from jackpot.compute.batching import ModelPass, Siblings, passes_of_rows, plan_rows, shared_rows

# Most tokens of any rank, over the mean, that splitting by whole groups may cause: all ranks wait for that one.
_TOLERATED_LOAD = 1.1


def plan_passes(
    lengths: Sequence[int],
    max_batch_tokens: int,
    *,
    group_starts: Sequence[int] = (),
    rank: int = 0,
    size: int = 1,
    packed: bool = False,
    siblings: Siblings | None = None,
) -> list[ModelPass]:
    """The passes of one rank over a batch: equally many on every rank, every sequence counted once.

    Args:
        lengths: tokens of each sequence, of the whole batch.
        max_batch_tokens: upper bound of a pass, padding included.
        group_starts: see :func:`batch_shares`.
        rank: the rank of these passes.
        size: the number of ranks.
        packed: sequences lie one after the other, without padding; otherwise they are rows of similar length.
        siblings: the sequences that may share a row.
    """
    shares = batch_shares(lengths, group_starts, size)
    return plan_share(lengths, shares, rank, max_batch_tokens, packed=packed, siblings=siblings)


def plan_share(
    lengths: Sequence[int],
    shares: Sequence[Sequence[int]],
    rank: int,
    max_batch_tokens: int,
    *,
    packed: bool = False,
    siblings: Siblings | None = None,
) -> list[ModelPass]:
    """The same for given ``shares`` of the sequences, one for each rank; a share may be empty."""
    plans = [_plan_own(lengths, share, max_batch_tokens, packed, siblings) for share in shares]
    passes = plans[rank]
    missing = max(map(len, plans)) - len(passes)
    filler = ModelPass((filler_row(lengths, shares[rank]),), (1,), counted=False)
    return passes + [filler] * missing


def filler_row(lengths: Sequence[int], share: Sequence[int]) -> int:
    """The sequence of a rank's filler passes: the shortest of its own, or of all if it has none."""
    return min(share or range(len(lengths)), key=lambda row: lengths[row])


def batch_shares(lengths: Sequence[int], group_starts: Sequence[int], size: int) -> list[list[int]]:
    """Split a batch among ranks: by whole groups, so that each rank reads only its own, or by sequences if whole groups
    would give a rank much more than its share.

    Args:
        lengths: tokens of each sequence.
        group_starts: index of each group's first sequence; empty if sequences belong to no groups.
        size: the number of ranks.
    """
    if size == 1 or len(group_starts) < size:
        return balanced_shares(lengths, size)
    bounds = [*group_starts, len(lengths)]
    groups = [range(first, last) for first, last in pairwise(bounds)]
    by_group = [
        [row for group in share for row in groups[group]]
        for share in balanced_shares([sum(lengths[row] for row in group) for group in groups], size)
    ]
    heaviest = max(sum(lengths[row] for row in share) for share in by_group)
    return by_group if heaviest <= _TOLERATED_LOAD * sum(lengths) / size else balanced_shares(lengths, size)


def balanced_shares(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Split sequences among ranks, with about equally many tokens: the longest first, each to the rank with fewest.

    A share may be empty. Within a share sequences keep their order.
    """
    if size == 1:
        return [list(range(len(lengths)))]
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [(0, rank) for rank in range(size)]
    for row in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        load, rank = heapq.heappop(loads)
        shares[rank].append(row)
        heapq.heappush(loads, (load + lengths[row], rank))
    return [sorted(share) for share in shares]


def plan_packed(lengths: Sequence[int], max_batch_tokens: int, siblings: Siblings | None = None) -> list[ModelPass]:
    """Passes of one row each, in which sequences lie one after the other. Siblings whose prompt is worth sharing have
    separate passes, in rows that begin with it.

    Args:
        lengths: tokens of each sequence, prompt and completion.
        max_batch_tokens: upper bound of a pass. A sequence longer than this is a pass of its own.
        siblings: the sequences that may share a prompt; None shares none.
    """
    if siblings is None:
        return [ModelPass(tuple(places), (1,) * len(places)) for places in packed_bins(lengths, max_batch_tokens)]
    rows = shared_rows(lengths, siblings, max_batch_tokens)
    alone = [row[0] for row in rows if len(row) == 1]
    packed = [
        [alone[place] for place in places] for places in packed_bins([lengths[row] for row in alone], max_batch_tokens)
    ]
    return [
        *passes_of_rows([row for row in rows if len(row) > 1], lengths, max_batch_tokens, siblings),
        *(ModelPass(tuple(places), (1,) * len(places)) for places in packed),
    ]


def packed_bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack sequences into bins of at most ``capacity`` tokens: the longest first, each into the first bin with room.

    At most 11/9 of the fewest bins possible, plus one. A sequence beyond the capacity is a bin of its own.
    """
    bins: list[list[int]] = []
    free: list[int] = []
    for row in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        place = next((index for index, room in enumerate(free) if room >= lengths[row]), None)
        if place is None:
            bins.append([row])
            free.append(capacity - lengths[row])
        else:
            bins[place].append(row)
            free[place] -= lengths[row]
    return bins


def _plan_own(
    lengths: Sequence[int], share: Sequence[int], max_batch_tokens: int, packed: bool, siblings: Siblings | None
) -> list[ModelPass]:
    if not share:
        return []
    plan = plan_packed if packed else plan_rows
    share_siblings = None if siblings is None else siblings.select(share)
    passes = plan([lengths[row] for row in share], max_batch_tokens, share_siblings)
    return [
        ModelPass(tuple(share[index] for index in model_pass.sequences), model_pass.per_row) for model_pass in passes
    ]
