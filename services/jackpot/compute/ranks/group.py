"""The ranks of a service: the processes that compute as one, and their communication besides FSDP's own.

Bytes and tensors only. Every call is a collective: all ranks make it, in the same order, or none returns. A lost rank
shows at once as a broken connection, and a hanging one after ``timeout_seconds``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from jackpot.compute.ranks.launch import is_rank
from jackpot.errors import ConfigError, JackpotError

Finding = TypeVar("Finding", bool, float | None, str | None)


class RanksConfig(Protocol):
    """The settings of a service's ranks."""

    @property
    def processes(self) -> int:
        """How many."""

    @property
    def device(self) -> str:
        """``auto``, ``cpu`` or ``cuda[:n]``."""

    @property
    def collective_timeout_seconds(self) -> float:
        """How long a rank waits for the others."""


class RankLostError(JackpotError):
    """Another rank of the service is gone or hangs; the launcher restarts all of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """This process's place among the ranks.

    Without a ``mesh`` there is one process, and models are whole and plain.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # this rank's device; None: the device on which the models were loaded
    mesh: DeviceMesh | None = None  # over all ranks; FSDP shards over it
    checkpoint_group: dist.ProcessGroup | None = None  # separate: checkpoints are written during training

    def broadcast(self, payload: bytes = b"") -> bytes:
        """Rank 0's ``payload``, on every rank.

        Raises:
            RankLostError: a rank is gone, or rank 0 sent nothing in time.
        """
        if self.size == 1:
            return payload
        size = torch.tensor([len(payload)])
        try:
            dist.broadcast(size, 0)
            content = torch.empty(int(size), dtype=torch.uint8)
            if self.rank == 0:
                content.copy_(torch.from_numpy(np.frombuffer(bytearray(payload), dtype=np.uint8)))
            dist.broadcast(content, 0)
        except RuntimeError as error:
            raise RankLostError(_LOST.format(error)) from error
        return payload if self.rank == 0 else content.numpy().tobytes()

    def of_rank_0_(self, tensor: Tensor) -> None:
        """Replace a CPU tensor by rank 0's, in place.

        Raises:
            RankLostError: a rank is gone or hangs.
        """
        if self.size == 1:
            return
        try:
            dist.broadcast(tensor, 0)
        except RuntimeError as error:
            raise RankLostError(_LOST.format(error)) from error

    def send(self, tensor: Tensor, rank: int) -> None:
        """Send a CPU tensor to another rank, which calls :meth:`receive_`.

        Raises:
            RankLostError: that rank is gone or hangs.
        """
        try:
            dist.send(tensor, rank)
        except RuntimeError as error:
            raise RankLostError(_LOST.format(error)) from error

    def receive_(self, tensor: Tensor) -> None:
        """Fill a CPU tensor with the one that rank 0 sends.

        Raises:
            RankLostError: rank 0 is gone or hangs.
        """
        try:
            dist.recv(tensor, 0)
        except RuntimeError as error:
            raise RankLostError(_LOST.format(error)) from error

    def finding_of_rank_0(self, finding: Finding) -> Finding:
        """Rank 0's result; a collective. Where rounding decides, all ranks must decide alike.

        Raises:
            RankLostError: a rank is gone or hangs.
        """
        told: Finding = json.loads(self.broadcast(json.dumps(finding).encode()))
        return told

    def agree(self, well: bool) -> bool:
        """Whether all ranks succeeded; a collective.

        Raises:
            RankLostError: a rank is gone or hangs.
        """
        failures = torch.tensor([0 if well else 1])
        self.sum_(failures)
        return int(failures) == 0

    def sum_(self, tensor: Tensor) -> None:
        """Add up a CPU tensor over all ranks, in place; every rank gets the same bits.

        Raises:
            RankLostError: a rank is gone or hangs.
        """
        if self.size == 1:
            return
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            raise RankLostError(_LOST.format(error)) from error


SOLO = Ranks()
"""One process with whole models."""


def join_ranks(
    service: str, config: RanksConfig, device: torch.device, environ: Mapping[str, str] = os.environ
) -> Ranks:
    """Join the other ranks of torchrun; without torchrun, a group of one.

    Args:
        service: the ranks' service; names its section of the job file in messages.
        config: the expected number of ranks, and how long a collective may wait.
        device: of ``<service>.device``; each rank of a machine takes the GPU of its local rank.
        environ: torchrun's variables.

    Raises:
        ConfigError: torchrun started a different number of ranks, or there are fewer GPUs than local ranks.
    """
    rank = int(environ["RANK"]) if is_rank(environ) else None
    size = int(environ.get("WORLD_SIZE", "1"))
    if rank is not None and size != config.processes:
        problem = f"torchrun started {size} ranks"
        raise ConfigError(f"{service}.processes", config.processes, problem, "Make both the same.")
    timeout = timedelta(seconds=config.collective_timeout_seconds)
    if device.type == "cuda":
        device = _own_gpu(service, config, int(environ.get("LOCAL_RANK", "0")))
    # gloo even with GPUs: orders, figures and checkpoints travel between CPUs.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if rank is None:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    return Ranks(
        rank=rank or 0,
        size=size,
        device=device,
        mesh=init_device_mesh(device.type, (size,)),
        checkpoint_group=dist.new_group(backend="gloo", timeout=timeout),
    )


def leave_ranks() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _own_gpu(service: str, config: RanksConfig, local_rank: int) -> torch.device:
    if config.processes == 1 and config.device not in ("auto", "cuda"):
        device = torch.device(config.device)
    elif local_rank < torch.cuda.device_count():
        device = torch.device("cuda", local_rank)
    else:
        problem = f"local rank {local_rank} has no GPU: this process sees {torch.cuda.device_count()}"
        remedy = "Use as many processes as there are GPUs."
        raise ConfigError(f"{service}.processes", config.processes, problem, remedy)
    torch.cuda.set_device(device)
    return device


_LOST = "another rank is gone or hangs ({}). The end of its log says why; all ranks restart."
