"""Tests whether a model gives sequences packed into one row the hidden states that they have alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.compute.forward import completion_hidden, packed_completion_hidden
from jackpot.compute.model_checks import trial_length
from jackpot.compute.models import architecture, vocabulary_size
from jackpot.compute.ranks.group import Ranks
from jackpot.compute.shared_prompts import sees_all
from jackpot.compute.varlen import HasKernel, attends_by_lengths, switched

LOG = logging.getLogger(__name__)

# Largest difference of hidden states accepted, relative to the largest: rounding, no more.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02}
_HALF_TOLERANCE = 0.1
# Beside these one as short as can be, and one as long as is cheap.
_LENGTHS, _PROMPTS = (5, 3, 7, 2), (2, 1, 3, 1)
_LONG_PROMPT = 4


@torch.no_grad()
def packs_exactly(model: PreTrainedModel) -> bool:
    """Whether it does, with its current attention. For a sharded model all ranks must call it."""
    packed: Tensor | None = None
    try:
        packed = _packed(model)
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except Exception as error:  # an architecture's own code may raise anything, such as at a row beyond its positions
        LOG.info("%s cannot pass packed rows: %s", architecture(model), error)
    alone = _alone(model)  # last, as below
    return packed is not None and _difference(packed, alone) <= _tolerance(alone)


@torch.no_grad()
def problem_with_varlen(model: PreTrainedModel) -> str | None:
    """Why it does not when it attends by lengths, or None if it does. A full trial, compared with the model's own
    attention. On a CPU a loop over the sequences replaces the kernel; everything else is as on a GPU.

    The model keeps its attention. For a sharded one all ranks must call it.
    """
    name = architecture(model)
    if not sees_all(model.config.get_text_config()):
        return f"{name} has layers that do not see the whole context"
    broke_off: Exception | None = None
    try:
        with switched(model):
            if not attends_by_lengths(model):
                return f"{name} does not allow another attention implementation"
            packed = _packed(model)
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except Exception as error:  # an architecture's own code may raise anything; rows remain as a fallback
        broke_off = error
    # Last, because FSDP frees nothing after an interrupted pass; a whole pass ends that state.
    alone = _alone(model)
    if broke_off is not None:
        return f"{name}: {broke_off}"
    difference = _difference(packed, alone)
    if difference <= _tolerance(alone):
        return None
    return f"{name} lets packed sequences see each other (hidden states differ by {difference:.2g} of the largest)"


def agreed_problem_with_varlen(
    models: Sequence[tuple[PreTrainedModel, torch.dtype]], device: torch.device, ranks: Ranks, has_varlen: HasKernel
) -> str | None:
    """Why not all models can attend by lengths, or None if they can; a collective.

    Args:
        models: each with its compute dtype.
        device: where they compute.
        ranks: over which they are sharded; all of them try, and rank 0's result counts.
        has_varlen: whether torch has the kernel.
    """
    without = [dtype for _, dtype in models if not has_varlen(device, dtype)]
    problem: str | None = None
    if without:
        name = str(without[0]).removeprefix("torch.")
        problem = f"torch {torch.__version__} has no attention by lengths for {name} on this {device.type}"
    problem = ranks.finding_of_rank_0(problem)
    if problem is None:
        problems = [problem for model, _ in models if (problem := problem_with_varlen(model))]
        problem = ranks.finding_of_rank_0(problems[0] if problems else None)
    return problem


def _sequences(model: PreTrainedModel) -> list[NDArray[np.int64]]:
    """The last is the longest: whatever it does to the others shows."""
    random = np.random.default_rng(0)
    lengths = (*_LENGTHS, trial_length(model))
    return [random.integers(0, vocabulary_size(model), length) for length in lengths]


def _packed(model: PreTrainedModel) -> Tensor:
    return packed_completion_hidden(model, _sequences(model), (*_PROMPTS, _LONG_PROMPT))


def _alone(model: PreTrainedModel) -> Tensor:
    each = zip(_sequences(model), (*_PROMPTS, _LONG_PROMPT), strict=True)
    return torch.cat([completion_hidden(model, [sequence], [prompt]) for sequence, prompt in each])


def _difference(packed: Tensor, alone: Tensor) -> float:
    """The largest, relative to the largest state."""
    return float((packed - alone).abs().max()) / (float(alone.abs().max()) or 1.0)


def _tolerance(states: Tensor) -> float:
    return _TOLERANCE.get(states.dtype, _HALF_TOLERANCE)
