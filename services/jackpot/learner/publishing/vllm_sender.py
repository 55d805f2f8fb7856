"""The learner's end of a broadcast group, built on the trainer side of vLLM's weight transfer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

# vLLM reads these when it is imported.
for _name in ("VLLM_NO_USAGE_STATS", "VLLM_DO_NOT_TRACK"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")

from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource  # noqa: E402
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory  # noqa: E402
from vllm.distributed.weight_transfer.nccl_common import (  # noqa: E402
    NCCLWeightTransferInitInfo,
    worker_init_payload,
)
from vllm.distributed.weight_transfer.nccl_engine import (  # noqa: E402
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
)

from jackpot.compute.ranks.gloo_group import GlooGroup  # noqa: E402
from jackpot.learner.publishing.replica_client import Layout, ReplicaClient  # noqa: E402
from jackpot.storage.weight_probe import WeightProbe  # noqa: E402

# Two such buffers on each GPU; larger ones are no faster.
BUFFER_BYTES = 256 << 20


class StateSource(WeightSource):
    """A version's CPU tensors, moved to the sending device one at a time."""

    def __init__(self, device: torch.device) -> None:
        self.state: Mapping[str, Tensor] = {}
        self._device = device

    def metadata(self) -> list[ParamMeta]:
        """See vLLM."""
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.state.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """See vLLM."""
        for name, tensor in self.state.items():
            yield name, tensor.to(self._device)


@dataclass
class GlooTrainerInitInfo(NCCLTrainerInitInfo):
    """As for NCCL, one tensor at a time."""

    backend: ClassVar[str] = "jackpot_gloo"
    timeout_seconds: float = 60.0


class GlooTrainerEngine(NCCLTrainerWeightTransferEngine):
    """vLLM's trainer side over TCP: the same calls in the same order, without a GPU."""

    init_info_cls = GlooTrainerInitInfo
    _gloo: GlooGroup | None = None

    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: Any = None) -> Self:
        """See vLLM. The replicas join while rank 0 waits for them."""
        from concurrent.futures import ThreadPoolExecutor

        engine = cls(client=client, source=source, is_sender=True, packed=False)
        host, port, size = init_info.master_address, init_info.master_port, init_info.world_size
        worker_info = NCCLWeightTransferInitInfo(
            master_address=host, master_port=port, rank_offset=1, world_size=size, packed=False
        )
        with ThreadPoolExecutor(max_workers=1) as executor:
            joined = executor.submit(client.init_weight_transfer_engine, worker_init_payload(worker_info))
            engine._gloo = GlooGroup(host, port, 0, size, init_info.timeout_seconds)
            joined.result()
        return engine

    def _broadcast(self, source: Any, meta: Any) -> None:
        for _, tensor in self._checked_iter(source, meta):
            assert self._gloo is not None
            self._gloo.broadcast(tensor.contiguous())

    def shutdown(self) -> None:
        """Leave the group."""
        self._gloo = None


WeightTransferTrainerFactory.register_engine(GlooTrainerInitInfo.backend, GlooTrainerEngine)


class VllmSender:
    """Implements :class:`jackpot.learner.publishing.broadcast.Sender`.

    Every call blocks; all are made from one thread at a time.

    Args:
        client: the group's replicas.
        transport: ``nccl`` or ``gloo``.
        host: this process's host, as seen from the replicas.
        port: a free port.
        device: the sending device; for NCCL a CUDA device.
        timeout_seconds: for gloo; NCCL has no deadline.
    """

    def __init__(
        self,
        client: ReplicaClient,
        *,
        transport: str,
        host: str,
        port: int,
        device: torch.device,
        timeout_seconds: float,
    ) -> None:
        self._client = client
        self._device = device if transport == "nccl" else torch.device("cpu")
        self._source = StateSource(self._device)
        self._use_device()
        if transport == "nccl":
            info = NCCLTrainerInitInfo(
                host, port, client.world_size, packed=True, packed_buffer_size_bytes=BUFFER_BYTES, rank=0
            )
        else:
            info = GlooTrainerInitInfo(
                host, port, client.world_size, packed=False, timeout_seconds=timeout_seconds, rank=0
            )
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=self._source)

    def send(self, version: int, state: Mapping[str, Tensor], probe: WeightProbe | None) -> None:
        """Send a version to every replica of the group.

        Raises:
            JackpotError: a replica refused it, or is gone.
            RuntimeError: the broadcast was interrupted.
        """
        self._use_device()
        self._source.state = state
        layout: Layout = [
            (meta.name, str(meta.dtype).removeprefix("torch."), list(meta.shape)) for meta in self._source.metadata()
        ]
        self._client.announce(version, layout, probe)
        try:
            self._engine.send_weights()
        finally:
            self._source.state = {}

    def close(self) -> None:
        """Leave the group, even in the middle of a hanging broadcast."""
        self._engine.shutdown()

    def _use_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread
