"""Batches of similar length: bounded, complete, and cheap."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jackpot.compute.batching import (
    PASS_OVERHEAD_TOKENS,
    AttentionCost,
    Siblings,
    length_buckets,
    plan_rows,
    shared_rows,
)

LENGTHS = st.lists(st.integers(min_value=1, max_value=400), max_size=40)


def padded(lengths: list[int], bucket: list[int]) -> int:
    return len(bucket) * max(lengths[index] for index in bucket)


def cost(lengths: list[int], buckets: list[list[int]], overhead: int = PASS_OVERHEAD_TOKENS) -> int:
    return sum(padded(lengths, bucket) + overhead for bucket in buckets)


@given(lengths=LENGTHS, limit=st.integers(min_value=1, max_value=2000))
def test_every_sequence_is_in_one_batch_and_no_batch_is_too_large(lengths: list[int], limit: int) -> None:
    buckets = length_buckets(lengths, limit)
    assert sorted(index for bucket in buckets for index in bucket) == list(range(len(lengths)))
    assert all(padded(lengths, bucket) <= limit or len(bucket) == 1 for bucket in buckets)


@given(lengths=st.lists(st.integers(min_value=1, max_value=50), min_size=1, max_size=7))
def test_the_split_is_the_cheapest_of_all_splits_of_the_sorted_lengths(lengths: list[int]) -> None:
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    all_splits = []
    for cuts in range(1 << (len(order) - 1)):
        split, bucket = [], [order[0]]
        for place, index in enumerate(order[1:]):
            if cuts >> place & 1:
                split.append(bucket)
                bucket = []
            bucket.append(index)
        all_splits.append([*split, bucket])
    assert cost(lengths, length_buckets(lengths, 10**6, 20), 20) == min(cost(lengths, s, 20) for s in all_splits)


def test_sequences_of_one_length_fill_batches_to_the_limit() -> None:
    assert [len(bucket) for bucket in length_buckets([10] * 64, 160)] == [16, 16, 16, 16]


def test_a_long_sequence_does_not_pad_the_short_ones() -> None:
    assert length_buckets([5, 1000, 6, 5], 8192) == [[1], [2, 0, 3]]


def test_short_sequences_share_a_pass_because_a_pass_has_its_price() -> None:
    assert length_buckets([3, 12, 7], 8192) == [[1, 2, 0]]


def test_a_sequence_longer_than_the_limit_is_alone() -> None:
    assert length_buckets([100, 20, 20], 50) == [[0], [1, 2]]


def test_no_sequences_make_no_batches() -> None:
    assert length_buckets([], 100) == []


@pytest.mark.parametrize("seed", range(3))
def test_padding_is_small_on_lengths_as_they_occur(seed: int) -> None:
    lengths = np.random.default_rng(seed).lognormal(5, 0.7, 256).astype(int) + 1
    buckets = length_buckets(lengths.tolist(), 16384)
    total = sum(padded(lengths.tolist(), bucket) for bucket in buckets)
    assert lengths.sum() / total > 0.85


def siblings_of(groups: list[tuple[int, list[int]]], mask_factor: float = 1.0) -> tuple[list[int], Siblings]:
    """Lengths and siblings of groups: tokens of the prompt, and of each completion."""
    lengths = [prompt + own for prompt, completions in groups for own in completions]
    numbers = [number for number, (_, completions) in enumerate(groups) for _ in completions]
    prompts = [prompt for prompt, completions in groups for _ in completions]
    return lengths, Siblings(numbers, prompts, AttentionCost(400.0, mask_factor))


def row_cost(row: list[int], lengths: list[int], siblings: Siblings) -> float:
    prompt = siblings.prompt_lengths[row[0]]
    tokens = prompt + sum(lengths[index] - prompt for index in row)
    cost = siblings.attention
    return tokens + tokens**2 / cost.tokens * (0.5 if len(row) == 1 else cost.mask_factor)


GROUPS = st.lists(
    st.tuples(st.integers(1, 60), st.lists(st.integers(1, 60), min_size=1, max_size=6)), min_size=1, max_size=6
)


@given(groups=GROUPS, limit=st.integers(1, 500), mask_factor=st.sampled_from([1.0, 6.0]))
def test_only_siblings_share_a_row_and_never_for_more_work(
    groups: list[tuple[int, list[int]]], limit: int, mask_factor: float
) -> None:
    lengths, siblings = siblings_of(groups, mask_factor)
    rows = shared_rows(lengths, siblings, limit)
    assert [index for row in rows for index in row] == list(range(len(lengths)))
    assert all(len({siblings.prompts[index] for index in row}) == 1 for row in rows)
    alone = sum(row_cost([index], lengths, siblings) for index in range(len(lengths)))
    assert sum(row_cost(row, lengths, siblings) for row in rows) <= alone * (1 + 1e-9)
    for row in (row for row in rows if len(row) > 1):
        prompt = siblings.prompt_lengths[row[0]]
        assert prompt + sum(lengths[index] - prompt for index in row) <= limit


@pytest.mark.parametrize(
    ("prompt", "own", "mask_factor", "per_row"),
    [
        (14, 12, 1.0, [8]),  # 110 + 110²/400 = 140 against 8 · (26 + 26²/800) = 215
        (14, 12, 6.0, [1] * 8),  # 110 + 6 · 110²/400 = 292; four pairs 239
        (14, 64, 1.0, [1] * 8),
        (64, 64, 1.0, [3, 2, 3]),  # 1124; four pairs 1137, eight alone 1188, one row of eight 1405
        (256, 8, 1.0, [8]),
        (256, 8, 6.0, [8]),  # 1856 against 8 · (264 + 264²/800) = 2809
    ],
)
def test_long_completions_stand_alone_and_short_ones_together(
    prompt: int, own: int, mask_factor: float, per_row: list[int]
) -> None:
    lengths, siblings = siblings_of([(prompt, [own] * 8)], mask_factor)
    assert [len(row) for row in shared_rows(lengths, siblings, 8192)] == per_row


def test_passes_of_shared_rows_are_bounded_and_keep_siblings_together() -> None:
    lengths, siblings = siblings_of([(14, [12] * 8)] * 5)
    passes = plan_rows(lengths, 250, siblings)
    assert [one.per_row for one in passes] == [(8,), (8, 8), (8, 8)]
    assert passes[1].sequences == tuple(range(8, 24))
    assert [one.per_row for one in plan_rows(lengths, 250)] == [(1,) * 4] + [(1,) * 9] * 4
