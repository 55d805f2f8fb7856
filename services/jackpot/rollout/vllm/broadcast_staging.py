"""Inside vLLM's worker process: receiving what the learner broadcasts, into host memory.

The bytes are staged there, not loaded as they come: a broadcast that breaks off leaves the model as it was. Every
function here blocks and is to be called in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# Name, dtype as torch calls it, shape; in the order in which they are sent.
Layout = Sequence[tuple[str, str, Sequence[int]]]


class Wire(Protocol):
    """This worker's end of a broadcast group."""

    def receive(self, layout: Layout) -> dict[str, Tensor]:
        """One version, as CPU tensors."""

    def close(self) -> None:
        """Leave, also in the middle of a broadcast."""


def join_group(info: Mapping[str, Any], parallel_config: Any, device: torch.device, timeout_seconds: float) -> Wire:
    """Join as one of the workers of this replica; returns once all members are there.

    Args:
        info: the fields of ``JoinTransferRequest``.
        parallel_config: vLLM's, which tells this worker's rank in the replica.
        device: of this worker.
        timeout_seconds: for gloo. NCCL knows no deadline: whoever waits has to have one.
    """
    settings = dict(info)
    transport = settings.pop("transport")
    if transport == "gloo":
        return _GlooWire(settings, parallel_config, timeout_seconds)
    return _NcclWire(settings, parallel_config, device)


class _GlooWire:
    def __init__(self, info: Mapping[str, Any], parallel_config: Any, timeout_seconds: float) -> None:
        from jackpot.compute.ranks.gloo_group import GlooGroup

        # As vLLM counts workers for NCCL.
        worker = parallel_config.data_parallel_index * parallel_config.world_size + parallel_config.rank
        host, port, size = info["master_address"], info["master_port"], info["world_size"]
        self._group = GlooGroup(host, port, info["rank_offset"] + worker, size, timeout_seconds)

    def receive(self, layout: Layout) -> dict[str, Tensor]:
        state = {name: torch.empty(tuple(shape), dtype=getattr(torch, dtype)) for name, dtype, shape in layout}
        for tensor in state.values():
            self._group.broadcast(tensor)
        return state

    def close(self) -> None:
        del self._group


class _NcclWire:
    """vLLM's own packed broadcast; only that what arrives is staged."""

    def __init__(self, info: Mapping[str, Any], parallel_config: Any, device: torch.device) -> None:
        from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_process_group

        torch.accelerator.set_device_index(device.index or 0)  # a thread begins on device 0
        self._info = NCCLWeightTransferInitInfo(**info)
        self._device = device
        self._group = worker_init_process_group(self._info, parallel_config)

    def receive(self, layout: Layout) -> dict[str, Tensor]:
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer

        torch.accelerator.set_device_index(self._device.index or 0)
        state: dict[str, Tensor] = {}

        def stage(pairs: Sequence[tuple[str, Tensor]]) -> None:
            # On the stream of the broadcast, so after it; to the host, so done when this returns.
            state.update((name, tensor.to("cpu")) for name, tensor in pairs)

        packed_nccl_broadcast_consumer(
            iterator=iter([(name, (list(shape), getattr(torch, dtype))) for name, dtype, shape in layout]),
            group=self._group,
            src=0,
            post_unpack_func=stage,
            buffer_size_bytes=self._info.packed_buffer_size_bytes,
            num_buffers=self._info.packed_num_buffers,
            device=self._device,
        )
        return state

    def close(self) -> None:
        self._group.destroy()  # aborts what hangs
