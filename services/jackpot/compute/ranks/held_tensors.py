"""The tensors of a model that this process holds, and loading a weight version into them. Of a sharded model it reads
only its slices from the file, so that no process ever has the whole in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from jackpot.compute.model_weights import hub_format, own_tensors, read_tensors
from jackpot.compute.ranks.sharding import rows_of
from jackpot.errors import JackpotError


class HeldTensors:
    """The tensors of a model that this process holds: all of them, or its slices of a model sharded on dimension 0.

    Create it once, while no pass is running; :meth:`read` may then run concurrently with passes.

    Args:
        model: whole, or sharded by :func:`jackpot.compute.ranks.sharding.shard`.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors, _ = own_tensors(model)
        self._names = hub_format(model)
        self._local: dict[str, Tensor] = {}
        self._rows: dict[str, slice] = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                self._local[name] = tensor.to_local()
                self._rows[name] = _own_rows(name, tensor)
            else:
                self._local[name] = tensor

    @property
    def num_bytes(self) -> int:
        """Bytes of what this process holds."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._local.values())

    def read(self, weights_dir: Path) -> dict[str, Tensor]:
        """Read this process's part of a weight version into memory; the model stays unchanged.

        Returns:
            CPU tensors for :meth:`apply`.

        Raises:
            WeightCorruptError: the file cannot be read, or its names or shapes are not the model's.
            FileNotFoundError: there is no such file (the version was pruned).
        """
        return read_tensors(weights_dir, self._names, self._rows)

    def copied(self, shards: torch.dtype | None = None) -> dict[str, Tensor]:
        """A copy of what this process holds in CPU memory, for :meth:`apply`: the same weights to the bit.

        Args:
            shards: number format of a sharded model's slices: that in which FSDP computes gives the same passes. None
                is their own.
        """
        copies = {}
        for name, tensor in self._local.items():
            cast = shards is not None and name in self._rows and tensor.is_floating_point()
            copies[name] = begin_copy(tensor.detach(), shards if cast and shards else tensor.dtype)
        for device in {tensor.device for tensor in self._local.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return copies

    @torch.no_grad()
    def apply(self, state: Mapping[str, Tensor]) -> None:
        """Copy tensors of :meth:`read` into the model, in place, cast to its number format. No pass may be running,
        and a sharded model must have released its gathered parameters."""
        for name, tensor in self._local.items():
            tensor.copy_(state[name])


def begin_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy on the CPU. For a tensor on a GPU it is valid only after a synchronization: it lies in page-locked memory,
    which the GPU writes by itself at several times the speed, and which torch reuses for the next copy."""
    if tensor.device.type != "cuda":
        return tensor.to("cpu", dtype, copy=True)
    return torch.empty(tensor.shape, dtype=dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _own_rows(name: str, tensor: DTensor) -> slice:
    """The position of a tensor's local part in the whole."""
    mesh = tensor.device_mesh
    rows = rows_of(tensor.shape[0], mesh.size(), mesh.get_local_rank())
    if tuple(tensor.to_local().shape) != (rows.stop - rows.start, *tensor.shape[1:]):
        raise JackpotError(
            f"this version of torch does not shard {name} {tuple(tensor.shape)} along its first dimension: "
            f"{tuple(tensor.to_local().shape)} on rank {mesh.get_local_rank()} of {mesh.size()}. "
            "Install the version of torch that the requirements name."
        )
    return rows
