"""The plan of passes: every sequence once, as many passes on every rank, tokens balanced."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jackpot.compute.batching import AttentionCost, Siblings
from jackpot.compute.ranks.partition import balanced_shares, batch_shares, packed_bins, plan_packed, plan_passes

LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, size=st.integers(1, 6), packed=st.booleans())
def test_ranks_pass_every_sequence_once_and_all_equally_often(lengths: list[int], size: int, packed: bool) -> None:
    plans = [plan_passes(lengths, 100, rank=rank, size=size, packed=packed) for rank in range(size)]
    counted = [row for plan in plans for one in plan for row in one.sequences if one.counted]
    assert sorted(counted) == list(range(len(lengths)))
    assert len({len(plan) for plan in plans}) == 1 and len(plans[0]) >= 1
    for one in (one for plan in plans for one in plan if len(one.sequences) > 1):
        own = [lengths[row] for row in one.sequences]
        assert (sum(own) if packed else len(own) * max(own)) <= 100


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, size=st.integers(1, 6))
def test_shares_differ_by_no_more_than_one_sequence(lengths: list[int], size: int) -> None:
    loads = [sum(lengths[row] for row in share) for share in balanced_shares(lengths, size)]
    assert max(loads) - min(loads) <= max(lengths)


def test_groups_stay_whole_where_that_costs_little_and_are_divided_where_it_costs_much() -> None:
    lengths = [30, 30, 28, 31, 30, 30, 32, 29]
    assert batch_shares(lengths, [0, 2, 4, 6], 2) == [[2, 3, 6, 7], [0, 1, 4, 5]]
    uneven = [90, 90, 10, 10, 10, 10, 10, 10]
    assert batch_shares(uneven, [0, 2, 4, 6], 2) == balanced_shares(uneven, 2) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert batch_shares(lengths, [0, 4], 3) == balanced_shares(lengths, 3)  # fewer groups than ranks


def test_a_rank_without_sequences_passes_the_shortest_as_a_filler() -> None:
    plan = plan_passes([9, 4], 100, rank=2, size=3)
    assert [(one.sequences, one.counted) for one in plan] == [((1,), False)]


def test_packed_bins_fill_up_and_one_too_long_stands_alone() -> None:
    assert packed_bins([5, 120, 60, 40, 30, 10], 100) == [[1], [2, 3], [4, 5, 0]]
    many = np.random.default_rng(0).integers(1, 50, 300).tolist()
    assert len(packed_bins(many, 100)) <= -(-sum(many) // 100) * 11 / 9 + 1


def test_siblings_with_a_long_prompt_share_rows_and_what_is_alone_is_packed() -> None:
    """Three completions of 8 behind a prompt of 60, and three of 60 behind one of 8: the second are cheaper alone."""
    lengths = [68, 68, 68, 68, 68, 40]
    siblings = Siblings([0, 0, 0, 1, 1, 1], [60, 60, 60, 8, 8, 8], AttentionCost(200.0))
    plan = plan_packed(lengths, 110, siblings)
    assert [(one.sequences, one.per_row) for one in plan] == [((0, 1, 2), (3,)), ((3, 5), (1, 1)), ((4,), (1,))]
    assert [one.sequences for one in plan_packed(lengths, 110)] == [(0, 5), (1,), (2,), (3,), (4,)]
