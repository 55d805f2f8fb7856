"""A forward pass over completions: from prompt and completion ids to the states that predict each completion token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.compute.models import hidden_states

CompletionStates = Callable[
    [PreTrainedModel, Sequence[NDArray[np.integer]], Sequence[int], Sequence[int] | None], Tensor
]
"""The type of :func:`completion_hidden` and :func:`packed_completion_hidden`, two ways to the same states."""


def completion_hidden(
    model: PreTrainedModel,
    sequences: Sequence[NDArray[np.integer]],
    prompt_lengths: Sequence[int],
    per_row: Sequence[int] | None = None,
) -> Tensor:
    """Hidden states ``[N, H]`` that predict the completion tokens of all sequences, one sequence after the other.

    One pass, rows padded on the right to the longest. N = Σ completion tokens. Carries a gradient unless the caller
    has disabled it.

    Args:
        model: a model of :func:`jackpot.compute.model_loading.load_causal_lm`.
        sequences: prompt and completion ids of each, ``[P + T]``.
        prompt_lengths: P ≥ 1 of each.
        per_row: how many consecutive sequences share a row, which holds their common prompt once; None is one each.
            For models that :func:`jackpot.compute.shared_prompts.attention_cost` supports.
    """
    if per_row is not None and len(per_row) < len(sequences):
        return _shared_hidden(model, sequences, prompt_lengths, per_row)
    # The last token's state predicts no completion token.
    lengths = [len(sequence) - 1 for sequence in sequences]
    ids = np.zeros((len(sequences), max(lengths)), dtype=np.int64)
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        ids[row, :length] = sequence[:length]
    hidden = hidden_states(model, torch.from_numpy(ids).to(model.device))
    columns = np.arange(ids.shape[1])
    first = np.asarray(prompt_lengths)[:, None] - 1
    wanted = (columns >= first) & (columns < np.asarray(lengths)[:, None])
    # As indices: the size of a boolean selection would have to be read from the device first.
    return hidden.flatten(0, 1)[torch.from_numpy(np.flatnonzero(wanted)).to(hidden.device, non_blocking=True)]


def packed_completion_hidden(
    model: PreTrainedModel,
    sequences: Sequence[NDArray[np.integer]],
    prompt_lengths: Sequence[int],
    per_row: Sequence[int] | None = None,
) -> Tensor:
    """The same hidden states from one row without padding, in which the sequences lie one after the other.

    Attention stays within sequences: by their lengths in a model of :func:`jackpot.compute.varlen.switch`, in others
    by their positions, which restart at 0 with each sequence. With SDPA transformers turns these into a block-diagonal
    mask, whose cost grows with the square of the row. Sequences that share a prompt by ``per_row`` lie in rows as with
    :func:`completion_hidden`.
    """
    if per_row is not None and len(per_row) < len(sequences):
        return _shared_hidden(model, sequences, prompt_lengths, per_row)
    lengths = [len(sequence) - 1 for sequence in sequences]
    ids = np.concatenate([sequence[:-1] for sequence in sequences]).astype(np.int64)
    positions = np.concatenate([np.arange(length) for length in lengths])
    first = np.repeat(np.asarray(prompt_lengths) - 1, lengths)
    row = (torch.from_numpy(array)[None].to(model.device) for array in (ids, positions))
    input_ids, position_ids = row
    hidden = hidden_states(model, input_ids, position_ids=position_ids, packed_lengths=lengths)[0]
    wanted = torch.from_numpy(np.flatnonzero(positions >= first))
    return hidden[wanted.to(hidden.device, non_blocking=True)]


def _shared_hidden(
    model: PreTrainedModel,
    sequences: Sequence[NDArray[np.integer]],
    prompt_lengths: Sequence[int],
    per_row: Sequence[int],
) -> Tensor:
    """A row is a prompt followed by completions. Each completion sees the prompt and itself, at the positions that it
    would have alone. The prompt's last state, which all share, predicts each completion's first token."""
    firsts = np.concatenate([[0], np.cumsum(per_row)])
    # Without the last tokens, whose states predict no completion token.
    completion_lengths = [
        len(sequence) - 1 - prompt for sequence, prompt in zip(sequences, prompt_lengths, strict=True)
    ]
    prompts = [prompt_lengths[first] for first in firsts[:-1]]
    width = max(prompt + sum(completion_lengths[a:b]) for prompt, (a, b) in zip(prompts, pairwise(firsts), strict=True))
    ids = np.zeros((len(per_row), width), dtype=np.int64)
    positions = np.zeros_like(ids)
    part = np.full_like(ids, _PADDING)
    wanted = []
    for row, (prompt, (first, last)) in enumerate(zip(prompts, pairwise(firsts), strict=True)):
        ids[row, :prompt] = sequences[first][:prompt]
        positions[row, :prompt] = np.arange(prompt)
        part[row, :prompt] = _PROMPT
        start = prompt
        for index in range(first, last):
            end = start + completion_lengths[index]
            ids[row, start:end] = sequences[index][prompt:-1]
            positions[row, start:end] = np.arange(prompt, prompt + completion_lengths[index])
            part[row, start:end] = index
            wanted.append(np.r_[prompt - 1, start:end] + row * width)
            start = end
    input_ids, position_ids, parts = (torch.from_numpy(array).to(model.device) for array in (ids, positions, part))
    causal = torch.ones(width, width, dtype=torch.bool, device=model.device).tril()
    # Padding sees prompt and padding: attention to nothing would give NaN.
    seen = (parts[:, None, :] == parts[:, :, None]) | (parts[:, None, :] == _PROMPT)
    hidden = hidden_states(model, input_ids, (seen & causal)[:, None], position_ids)
    return hidden.flatten(0, 1)[torch.from_numpy(np.concatenate(wanted)).to(model.device)]


_PROMPT, _PADDING = -1, -2
