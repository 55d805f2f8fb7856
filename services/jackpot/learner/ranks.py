"""The ranks of a learner: the processes that train together. What they say to each other outside of FSDP's own traffic.

Bytes and tensors only. Every call is a collective: all ranks make it, in the same order, or none returns. A rank that
is gone shows at once as a broken connection, and one that hangs after ``timeout_seconds``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from jackpot.config import LearnerConfig
from jackpot.errors import ConfigError, JackpotError
from jackpot.learner.launch import is_rank


class RankLostError(JackpotError):
    """Another rank of the learner is gone or hangs; all of them start again, from the last checkpoint."""


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """This process among those that train together.

    Without a ``mesh`` there is one process, and models are whole and plain.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # where this rank computes; None: where the models were loaded
    mesh: DeviceMesh | None = None  # over all ranks; what FSDP shards over
    checkpoint_group: dist.ProcessGroup | None = None  # its own: checkpoints are written while training goes on

    def broadcast(self, payload: bytes = b"") -> bytes:
        """Rank 0's ``payload``, on every rank.

        Raises:
            RankLostError: a rank is gone, or rank 0 said nothing in time.
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


def join_ranks(config: LearnerConfig, device: torch.device, environ: Mapping[str, str] = os.environ) -> Ranks:
    """Meet the other ranks of torchrun; outside of it, be the only one, in a group of one.

    Args:
        config: how many are expected, and for how long a collective may wait.
        device: of ``learner.device``; each rank of a machine takes the GPU of its local rank.
        environ: torchrun's variables.

    Raises:
        ConfigError: torchrun started another number of ranks, or there are fewer GPUs than local ranks.
    """
    rank = int(environ["RANK"]) if is_rank(environ) else None
    size = int(environ.get("WORLD_SIZE", "1"))
    if rank is not None and size != config.processes:
        problem = f"torchrun started {size} ranks"
        raise ConfigError("learner.processes", config.processes, problem, "Make both the same.")
    timeout = timedelta(seconds=config.collective_timeout_seconds)
    if device.type == "cuda":
        device = _own_gpu(config, int(environ.get("LOCAL_RANK", "0")))
    # gloo also with GPUs: orders, figures and checkpoints travel between CPUs.
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


def _own_gpu(config: LearnerConfig, local_rank: int) -> torch.device:
    if config.processes == 1 and config.device not in ("auto", "cuda"):
        device = torch.device(config.device)
    elif local_rank < torch.cuda.device_count():
        device = torch.device("cuda", local_rank)
    else:
        problem = f"local rank {local_rank} has no GPU: this process sees {torch.cuda.device_count()}"
        raise ConfigError("learner.processes", config.processes, problem, "Use as many processes as there are GPUs.")
    torch.cuda.set_device(device)
    return device


_LOST = "another rank of the learner is gone or hangs ({}). Its end of the log says why; all ranks start again."
