"""Mixed precision in one process: float32 weights that learn, and a copy of them in 16 bits that computes.

It gives what FSDP gives (:mod:`jackpot.compute.ranks.sharding`), to the bit. But FSDP hooks into both passes of every
block, which takes the host about as long as launching all that the block does, and a small model's GPU waits for it.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel


class MixedPrecisionCopy:
    """The copy of a model that batches pass through.

    Gradients go to the model as they arrive, where they are added up in float32. None stays with the copy.

    Args:
        model: float32; what of it requires a gradient learns.
        dtype: what the copy computes in.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.computing = in_dtype(copy.deepcopy(model), dtype)
        # Tied parameters are one in both.
        self._pairs = list(zip(model.parameters(), self.computing.parameters(), strict=True))
        for learning, computing in self._pairs:
            if computing.requires_grad:
                computing.register_post_accumulate_grad_hook(partial(_hand_over, learning))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the model's weights, which have changed."""
        for learning, computing in self._pairs:
            computing.copy_(learning)


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Convert a model's parameters in place. Buffers stay as they are: positions need all of float32."""
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
