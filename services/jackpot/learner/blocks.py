"""Blocks of a model made ready for training: compiled, and without activations kept from the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from jackpot.config import LearnerConfig
from jackpot.runtime.ranks.sharding import decoder_blocks


def prepare_blocks(model: PreTrainedModel, config: LearnerConfig) -> None:
    """Compile the model's blocks and have them forget their activations, as the job asks; in place.

    Only ``forward`` is replaced, so that names of parameters stay and FSDP's hooks run outside of what is compiled.

    Raises:
        ConfigError: the model has no list of blocks to treat so.
    """
    if not config.compile and not config.activation_checkpointing:
        return
    for block in decoder_blocks(model):
        forward: Callable[..., Any] = block.forward
        if config.compile:
            forward = torch.compile(forward, dynamic=True)
        if config.activation_checkpointing:
            forward = _forgetful(forward)
        block.forward = forward


def _forgetful(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
