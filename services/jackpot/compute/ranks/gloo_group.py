"""A group of processes that broadcast tensors over TCP, by torch's gloo: no GPU, no global process group."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed
from torch import Tensor


class GlooGroup:
    """Rank 0 broadcasts to all others. Every call ends within the timeout, even if other ranks fail.

    Args:
        host: where rank 0 is.
        port: that rank 0 listens on until all have joined.
        rank: of this process.
        world_size: the number of ranks.
        timeout_seconds: for joining, and for each broadcast.

    Raises:
        RuntimeError: not all joined in time.
    """

    def __init__(self, host: str, port: int, rank: int, world_size: int, timeout_seconds: float) -> None:
        timeout = timedelta(seconds=timeout_seconds)
        dist: Any = torch.distributed
        self._store = dist.TCPStore(host, port, world_size, is_master=rank == 0, timeout=timeout)
        self._group = dist.ProcessGroupGloo(dist.PrefixStore("jackpot", self._store), rank, world_size, timeout)

    def broadcast(self, tensor: Tensor) -> None:
        """Send a contiguous CPU tensor from rank 0; elsewhere it is overwritten.

        Raises:
            RuntimeError: another rank is gone, or too slow.
        """
        options: Any = torch.distributed.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        self._group.broadcast([tensor], options).wait()
