"""A forward pass over completions: from prompt and completion ids to the states that predict each completion token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.runtime.models import hidden_states

CompletionStates = Callable[[PreTrainedModel, Sequence[NDArray[np.integer]], Sequence[int]], Tensor]
"""What :func:`completion_hidden` and :func:`packed_completion_hidden` are: two ways to the same states."""


def completion_hidden(
    model: PreTrainedModel, sequences: Sequence[NDArray[np.integer]], prompt_lengths: Sequence[int]
) -> Tensor:
    """Hidden states ``[N, H]`` that predict the completion tokens of all sequences, one sequence after the other.

    One pass, rows padded on the right to the longest. N = Σ completion tokens. Carries a gradient unless the caller
    turned it off.

    Args:
        model: a model of :func:`jackpot.runtime.models.load_causal_lm`.
        sequences: prompt and completion ids of each, ``[P + T]``.
        prompt_lengths: P ≥ 1 of each.
    """
    # The last token predicts nothing that is asked for here.
    lengths = [len(sequence) - 1 for sequence in sequences]
    ids = np.zeros((len(sequences), max(lengths)), dtype=np.int64)
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        ids[row, :length] = sequence[:length]
    hidden = hidden_states(model, torch.from_numpy(ids).to(model.device))
    columns = np.arange(ids.shape[1])
    first = np.asarray(prompt_lengths)[:, None] - 1
    wanted = (columns >= first) & (columns < np.asarray(lengths)[:, None])
    return hidden[torch.from_numpy(wanted).to(hidden.device)]


def packed_completion_hidden(
    model: PreTrainedModel, sequences: Sequence[NDArray[np.integer]], prompt_lengths: Sequence[int]
) -> Tensor:
    """The same hidden states from one row without padding, in which the sequences lie one after the other.

    Positions begin anew with each sequence, by which transformers keeps attention within sequences: with flash
    attention as so many lengths, with SDPA as a block-diagonal mask, whose cost grows with the square of the row.
    """
    lengths = [len(sequence) - 1 for sequence in sequences]
    ids = np.concatenate([sequence[:-1] for sequence in sequences]).astype(np.int64)
    positions = np.concatenate([np.arange(length) for length in lengths])
    first = np.repeat(np.asarray(prompt_lengths) - 1, lengths)
    row = (torch.from_numpy(array)[None].to(model.device) for array in (ids, positions))
    input_ids, position_ids = row
    hidden = hidden_states(model, input_ids, position_ids=position_ids)[0]
    return hidden[torch.from_numpy(positions >= first).to(hidden.device)]
