"""FSDP2: models sharded over ranks, and whole tensors back.

Number formats of trained models: parameters, gradient sums and AdamW's moments are float32. A model whose ``dtype`` is
bfloat16 computes in bfloat16 on copies that FSDP makes for each pass; gradients are summed over ranks and passes in
float32. AdamW on bfloat16 parameters would lose most steps at the learning rates of RL: 1e-6 of a weight is far
below the 2⁻⁸ that bfloat16 resolves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
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

from jackpot.compute.model_checks import check_company, self_check
from jackpot.compute.model_weights import own_tensors, put_tensor, tie
from jackpot.compute.models import SHARDED_FORWARD, architecture
from jackpot.compute.ranks.group import Ranks
from jackpot.errors import ConfigError

HELD = "held_rows"
"""Attribute of a model before sharding: this rank's rows of its tensors, and its buffers, by name."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def shard(model: PreTrainedModel, ranks: Ranks, dtype: str | None, *, field: str, cpu_offload: bool = False) -> None:
    """Shard a model over the ranks, block by block, and check it; in place, a collective. Its parameters are DTensors
    then.

    The embedding and the output layer stay gathered from a pass until :func:`release`: the vocabulary pass uses the
    output layer's weight outside of any module's forward, and the actor's distillation does so after the policy's
    backward pass.

    Args:
        model: of :func:`jackpot.compute.ranks.loading.load_on_ranks`. With float32 parameters if it learns, and
            without gradients if it does not.
        ranks: all of them, with a mesh.
        dtype: compute dtype; None is the parameters' own.
        field: the setting that named the model, for error messages.
        cpu_offload: whether parameters are kept in CPU memory between uses.

    Raises:
        ConfigError: its hidden states do not reproduce its logits, see :func:`jackpot.compute.model_checks.self_check`.
        RankLostError: a rank is gone or hangs.
    """
    assert ranks.mesh is not None
    settings: dict[str, Any] = {
        "mesh": ranks.mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=DTYPES[dtype] if dtype else None, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    blocks = decoder_blocks(model)
    for block in blocks:
        fully_shard(block, reshard_after_forward=True, **settings)
    fully_shard(model, reshard_after_forward=False, **settings)
    for module in (*blocks, model):
        assert isinstance(module, FSDPModule)
        # Losses are divided by the whole batch's size, so that gradients of ranks are added, not averaged. Only plain
        # sums exist on both gloo and NCCL.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_backward(False, recurse=False)
    _fill(model)
    # The trunk's forward, with the gathering of the root's parameters around it.
    setattr(model, SHARDED_FORWARD, model.base_model.forward)
    register_fsdp_forward_method(model, SHARDED_FORWARD)
    self_check(model, field=field)
    check_company(model, field=field)
    release(model)


def rows_of(rows: int, ranks: int, rank: int) -> slice:
    """The rows of a tensor that a rank holds: FSDP2 splits dimension 0 like ``torch.chunk``."""
    size = -(-rows // ranks)
    start = min(rank * size, rows)
    return slice(start, min(start + size, rows))


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Replace tensors on the meta device by this rank's rows, one at a time, so that at most one exists twice."""
    held: dict[str, Tensor] = getattr(model, HELD)
    delattr(model, HELD)
    tensors, aliases = own_tensors(model)
    for name, tensor in tensors.items():
        part = held.pop(name)
        if isinstance(tensor, DTensor):
            # The rows' device, which with offloading is not the mesh's.
            rows: Any = torch.empty_like(tensor, device=part.device)
            rows.to_local().copy_(part)
            put_tensor(model, name, nn.Parameter(rows, requires_grad=tensor.requires_grad))
        else:
            tensor.copy_(part)
    tie(model, aliases)


def decoder_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks of a decoder's stack.

    Raises:
        ConfigError: the architecture does not keep them in ``layers``.
    """
    layers = getattr(model.base_model, "layers", None) or getattr(model.base_model, "h", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            "model",
            architecture(model),
            "its blocks are not in `layers`: it can be neither sharded, compiled nor checkpointed by the block",
            "Use it with one process in float32, or use another architecture, such as Qwen3 or Llama.",
        )
    return list(layers)


def release(model: nn.Module) -> None:
    """Release gathered parameters: after passes, and before the parameters change."""
    if isinstance(model, FSDPModule):
        model.reshard()


@torch.no_grad()
def whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors by name, each once and whole. For a sharded model all ranks must iterate: tensors are
    gathered one at a time, so that a device never holds more than one."""
    release(model)
    tensors, _ = own_tensors(model)
    for name, tensor in tensors.items():
        yield name, (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
