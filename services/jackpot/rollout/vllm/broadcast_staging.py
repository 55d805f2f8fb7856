"""Inside vLLM's worker process: receives the learner's broadcasts into host memory.

The bytes are staged there and not loaded as they arrive: an interrupted broadcast leaves the model unchanged. Every
function here blocks; call it in a separate thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# Name, torch's name of the dtype, shape; in sending order.
Layout = Sequence[tuple[str, str, Sequence[int]]]


class Wire(Protocol):
    """This worker's end of a broadcast group."""

    def receive(self, layout: Layout) -> dict[str, Tensor]:
        """One version, as CPU tensors."""

    def close(self) -> None:
        """Leave, even in the middle of a broadcast."""


def join_group(info: Mapping[str, Any], parallel_config: Any, device: torch.device, timeout_seconds: float) -> Wire:
    """Join as one of the workers of this replica; returns once all members have joined.

    Args:
        info: the fields of ``JoinTransferRequest``.
        parallel_config: vLLM's, with this worker's rank in the replica.
        device: of this worker.
        timeout_seconds: for gloo. NCCL has no deadline, so that the caller needs its own.
    """
    settings = dict(info)
    transport = settings.pop("transport")
    if transport == "gloo":
        return _GlooWire(settings, parallel_config, timeout_seconds)
    return _NcclWire(settings, parallel_config, device)


class _GlooWire:
    def __init__(self, info: Mapping[str, Any], parallel_config: Any, timeout_seconds: float) -> None:
        from jackpot.compute.ranks.gloo_group import GlooGroup

        # The order in which vLLM numbers workers for NCCL.
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
    """vLLM's own packed broadcast, except that tensors are staged as they arrive."""

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
            # Runs on the broadcast's stream, hence after it; a copy to the host is complete when this returns.
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
        self._group.destroy()  # aborts a hanging broadcast
