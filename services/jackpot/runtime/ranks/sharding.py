"""FSDP2: models sharded over ranks, and whole tensors back.

Number formats of models that learn: parameters, gradients sums and AdamW's moments are float32. A model whose ``dtype``
is bfloat16 computes in bfloat16 on copies that FSDP makes for each pass; gradients are added up over ranks and passes
in float32. AdamW on bfloat16 parameters would lose most steps at the learning rates of RL: 1e-6 of a weight is far
below the 2⁻⁸ that bfloat16 resolves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from jackpot.errors import ConfigError
from jackpot.runtime.model_weights import own_tensors
from jackpot.runtime.models import SHARDED_FORWARD

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def shard(model: PreTrainedModel, mesh: DeviceMesh, dtype: str | None, *, cpu_offload: bool = False) -> None:
    """Shard a model over the mesh, block by block; in place. Its parameters are DTensors then.

    The embedding and the output layer stay gathered from a pass to the end of its backward pass: the vocabulary pass
    uses the output layer's weight outside of any module's forward.

    Args:
        model: with float32 parameters if it learns.
        mesh: all ranks.
        dtype: what it computes in; None is what its parameters are in.
        cpu_offload: whether parameters wait in the CPU's memory.
    """
    settings: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=DTYPES[dtype] if dtype else None, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    blocks = decoder_blocks(model)
    for block in blocks:
        fully_shard(block, reshard_after_forward=True, **settings)
    fully_shard(model, reshard_after_forward=False, **settings)
    for module in (*blocks, model):
        assert isinstance(module, FSDPModule)
        # Losses are divided by what the whole batch holds: gradients of ranks are added, not averaged. Only plain
        # sums exist on gloo and NCCL alike.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # The trunk's forward, with the gathering of the root's parameters around it.
    setattr(model, SHARDED_FORWARD, model.base_model.forward)
    register_fsdp_forward_method(model, SHARDED_FORWARD)


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that a decoder is a stack of.

    Raises:
        ConfigError: the architecture keeps them where we do not look.
    """
    layers = getattr(model.base_model, "layers", None) or getattr(model.base_model, "h", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            "model",
            type(model).__name__,
            "its blocks are not in `layers`: it can be neither sharded, compiled nor checkpointed by the block",
            "Use it with one process in float32, or use another architecture, such as Qwen3 or Llama.",
        )
    return list(layers)


def release(model: nn.Module) -> None:
    """Give up gathered parameters after a pass without a backward pass, which would have done so."""
    if isinstance(model, FSDPModule):
        model.reshard()


@torch.no_grad()
def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors by name, each once and whole. Of a sharded model, all ranks have to iterate: each tensor is
    gathered when it is its turn, so that a device never holds more than one."""
    release(model)
    own, _ = own_tensors(model)
    for name, tensor in own.items():
        yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
