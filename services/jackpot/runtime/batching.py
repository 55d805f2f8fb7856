"""Which sequences go through a model together: little padding, bounded memory. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# What one more pass through the model costs, as tokens: kernels are launched and weights read for it however few
# tokens it carries. Splitting a batch pays only where it saves more padding than that.
PASS_OVERHEAD_TOKENS = 256


def length_buckets(
    lengths: Sequence[int], max_batch_tokens: int, overhead_tokens: int = PASS_OVERHEAD_TOKENS
) -> list[list[int]]:
    """Split sequences into batches of similar length, at the least total cost.

    The cost of a batch is rows × longest plus ``overhead_tokens``; over sequences sorted by length the best split is
    found exactly. The result is a function of the lengths alone, so it is reproducible.

    Args:
        lengths: tokens of each sequence.
        max_batch_tokens: upper bound of rows × longest. A sequence longer than this is a batch of its own.
        overhead_tokens: the fixed cost of a batch, in tokens.

    Returns:
        Indices into ``lengths``: every index once, batches with the longest sequences first.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    longest = sizes[order]
    num = len(order)
    # best[j] is the least cost of the first j sequences, start[j] where their last batch begins.
    best = np.zeros(num + 1, dtype=np.int64)
    start = np.zeros(num + 1, dtype=np.int64)
    for end in range(1, num + 1):
        rows = end - np.arange(end)
        padded = rows * longest[:end]
        allowed = (padded <= max_batch_tokens) | (rows == 1)
        cost = np.where(allowed, best[:end] + padded + overhead_tokens, np.iinfo(np.int64).max)
        start[end] = np.argmin(cost)
        best[end] = cost[start[end]]
    return _batches(order.tolist(), start.tolist())


def _batches(order: list[int], start: list[int]) -> list[list[int]]:
    batches: list[list[int]] = []
    end = len(order)
    while end > 0:
        batches.append(order[start[end] : end])
        end = start[end]
    return batches[::-1]
