"""Mixed precision in one process: float32 weights that are trained, and a 16-bit copy of them that computes.

The result equals FSDP's (:mod:`jackpot.compute.ranks.sharding`), to the bit. But FSDP hooks into both passes of every
block. This takes the host about as long as launching the block's kernels, and a small model's GPU waits for it.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel


class MixedPrecisionCopy:
    """The 16-bit copy of a model that computes the passes.

    Gradients are moved to the model as they arrive, and summed there in float32. The copy keeps none.

    Args:
        model: float32; its parameters that require a gradient are trained.
        dtype: of the copy.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.computing = in_dtype(copy.deepcopy(model), dtype)
        # Tied parameters stay tied in the copy.
        self._pairs = list(zip(model.parameters(), self.computing.parameters(), strict=True))
        for learning, computing in self._pairs:
            if computing.requires_grad:
                computing.register_post_accumulate_grad_hook(partial(_hand_over, learning))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the model's changed weights."""
        for learning, computing in self._pairs:
            computing.copy_(learning)


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Convert a model's parameters in place. Buffers are unchanged: positions need the precision of float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _hand_over(learning: Tensor, computing: Tensor) -> None:
    gradient, computing.grad = computing.grad, None
    assert gradient is not None
    if learning.grad is None:
        learning.grad = gradient.to(learning.dtype)
    else:
        learning.grad.add_(gradient)
