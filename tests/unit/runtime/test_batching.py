"""Batches of similar length: bounded, complete, and cheap."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jackpot.runtime.batching import PASS_OVERHEAD_TOKENS, length_buckets

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
