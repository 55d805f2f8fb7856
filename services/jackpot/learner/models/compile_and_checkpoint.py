"""Prepares a model's blocks for training: compilation and activation checkpointing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from jackpot.compute.ranks.sharding import decoder_blocks
from jackpot.config import LearnerConfig
from jackpot.errors import ConfigError


def compile_and_checkpoint(model: PreTrainedModel, config: LearnerConfig) -> None:
    """Compile the model's blocks and checkpoint their activations, as the job asks; in place.

    Only ``forward`` is replaced, so that parameters keep their names and FSDP's hooks run outside of the compiled code.

    Raises:
        ConfigError: the model has no list of blocks.
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


def require_compiler(device: torch.device, environ: Mapping[str, str] = os.environ) -> None:
    """Check that torch.compile's output can be built: C++ for CPUs, and for GPUs Triton's launchers in C.

    Raises:
        ConfigError: there is no compiler.
    """
    wanted = (environ.get("CC"), "gcc", "clang", "cc") if device.type == "cuda" else (environ.get("CXX"), "g++")
    if not any(shutil.which(name) for name in wanted if name):
        problem = f"torch needs a compiler for it, and none is there ({', '.join(filter(None, wanted))})"
        raise ConfigError("learner.compile", True, problem, "Install g++ (apt-get install g++), or set it to false.")


def _forgetful(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
