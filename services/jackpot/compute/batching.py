"""Plans which sequences share a pass and a row: shared prompts where that is less work, little padding, bounded
memory. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

# The cost of one more pass, in tokens: it launches kernels and reads all weights, however few tokens it carries.
# Splitting a batch pays only if it saves more padding than that.
PASS_OVERHEAD_TOKENS = 256


@dataclass(frozen=True, slots=True)
class AttentionCost:
    """The cost of attention, relative to all other work on a token."""

    tokens: float
    """κ: the number of attended tokens at which attention costs as much as all other work."""
    mask_factor: float = 1.0
    """The factor by which attention with an explicit mask costs more than causal attention."""


@dataclass(frozen=True, slots=True)
class Siblings:
    """Sequences that begin with the same prompt, which a row can then hold once for several of them."""

    prompts: Sequence[int]
    """The index of each sequence's prompt. Siblings are adjacent."""
    prompt_lengths: Sequence[int]
    """Tokens of each sequence's prompt."""
    attention: AttentionCost
    """The attention cost of the model."""

    def select(self, sequences: Sequence[int]) -> Siblings:
        """The same for some of the sequences."""
        return Siblings(
            [self.prompts[index] for index in sequences],
            [self.prompt_lengths[index] for index in sequences],
            self.attention,
        )


@dataclass(frozen=True, slots=True)
class ModelPass:
    """Sequences that share one pass through a model.

    A filler pass is not ``counted``: it adds nothing to gradients, scores and figures. It exists because another rank
    has one more pass, and FSDP's collectives need all ranks in every pass.
    """

    sequences: tuple[int, ...]
    per_row: tuple[int, ...]
    """How many consecutive sequences lie in each row, after their one prompt."""
    counted: bool = True


def plan_rows(lengths: Sequence[int], max_batch_tokens: int, siblings: Siblings | None = None) -> list[ModelPass]:
    """The passes of sequences through a model: one sequence a row, or siblings in one row where that is less work.

    Args:
        lengths: tokens of each sequence, prompt and completion.
        max_batch_tokens: upper bound of a pass, padding included. A sequence longer than this is a pass of its own.
        siblings: the sequences that may share a row; None shares none.
    """
    rows = [[index] for index in range(len(lengths))]
    if siblings is not None:
        rows = shared_rows(lengths, siblings, max_batch_tokens)
    return passes_of_rows(rows, lengths, max_batch_tokens, siblings)


def passes_of_rows(
    rows: Sequence[Sequence[int]], lengths: Sequence[int], max_batch_tokens: int, siblings: Siblings | None
) -> list[ModelPass]:
    """Rows of similar length together; arguments as :func:`plan_rows`, which fills the rows."""
    tokens = [sum(lengths[index] for index in row) for row in rows]
    if siblings is not None:
        prompts = siblings.prompt_lengths
        tokens = [total - (len(row) - 1) * prompts[row[0]] for total, row in zip(tokens, rows, strict=True)]
    return [
        ModelPass(tuple(index for row in bucket for index in rows[row]), tuple(len(rows[row]) for row in bucket))
        for bucket in length_buckets(tokens, max_batch_tokens)
    ]


def shared_rows(lengths: Sequence[int], siblings: Siblings, max_row_tokens: int) -> list[list[int]]:
    """Sequences in rows: each prompt's sequences are split evenly, in the way that is the least work.

    A sequence of S tokens alone costs S + S²/2κ, its attention being causal; siblings in a row of L tokens, with
    the prompt once, cost L + m·L²/κ, since a mask over the whole row separates them. κ and m are fields of
    :class:`AttentionCost`. Prompts that are short relative to completions are therefore not shared.

    Args:
        lengths: tokens of each sequence.
        siblings: the sequences with the same prompt.
        max_row_tokens: upper bound of a shared row.
    """
    bounds = [0, *(i for i in range(1, len(lengths)) if siblings.prompts[i] != siblings.prompts[i - 1]), len(lengths)]
    rows: list[list[int]] = []
    for first, last in pairwise(bounds):
        if last > first:
            completion_lengths = [length - siblings.prompt_lengths[first] for length in lengths[first:last]]
            cuts = _cheapest_split(
                completion_lengths, siblings.prompt_lengths[first], siblings.attention, max_row_tokens
            )
            rows += [list(range(first + start, first + end)) for start, end in pairwise(cuts)]
    return rows


def _cheapest_split(
    completion_lengths: Sequence[int], prompt: int, attention: AttentionCost, max_row_tokens: int
) -> list[int]:
    """Where rows of completions of these lengths begin and end, each after the one prompt."""
    # In plain Python: numpy takes ten times as long for the few completions of a prompt.
    ends = [0, *accumulate(completion_lengths)]
    best = list(range(len(completion_lengths) + 1))
    best_cost = sum(
        tokens + tokens**2 / (2 * attention.tokens)
        for tokens in (prompt + completion for completion in completion_lengths)
    )
    for num_rows in range(1, len(completion_lengths)):
        cuts = [round(row * len(completion_lengths) / num_rows) for row in range(num_rows + 1)]
        rows = [prompt + ends[end] - ends[start] for start, end in pairwise(cuts)]
        cost = sum(tokens + attention.mask_factor * tokens**2 / attention.tokens for tokens in rows)
        if cost < best_cost and max(rows) <= max_row_tokens:
            best, best_cost = cuts, cost
    return best


def length_buckets(
    lengths: Sequence[int], max_batch_tokens: int, overhead_tokens: int = PASS_OVERHEAD_TOKENS
) -> list[list[int]]:
    """Split sequences into batches of similar length, at minimal total cost.

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
