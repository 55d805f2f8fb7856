"""The rollout replicas as a client of vLLM's weight transfer: four blocking calls, each to all replicas concurrently.

This is vLLM's ``VLLMWeightSyncClient``, which is structural, over our own gRPC. vLLM calls ``update_weights`` in a
separate thread while it broadcasts; the replicas handle pausing, versions and resuming.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jackpot.errors import EngineError, JackpotError
from jackpot.rpc.channel import call
from jackpot.rpc.proto import probe_to_proto
from jackpot.storage.weight_probe import WeightProbe
from jackpot.v1 import rollout_pb2

# Name, torch's name of the dtype, shape; in sending order.
Layout = Sequence[tuple[str, str, Sequence[int]]]

# How much longer than its own deadline a call may take to return to the waiting thread.
_GRACE_SECONDS = 5.0


class ReplicaClient:
    """One broadcast group's replicas.

    Args:
        stubs: the replicas' ``RolloutServiceStub`` by address.
        loop: the event loop of their channels; the calls come from other threads.
        session: the group's name.
        transport: ``nccl`` or ``gloo``.
        workers: processes of each replica that hold a part of the model.
        timeout_seconds: deadline of each call.
    """

    def __init__(
        self,
        stubs: Mapping[str, Any],
        loop: asyncio.AbstractEventLoop,
        *,
        session: str,
        transport: str,
        workers: int,
        timeout_seconds: float,
    ) -> None:
        self.session = session
        self.addresses = tuple(stubs)
        self._stubs = dict(stubs)
        self._loop = loop
        self._transport = transport
        self._workers = workers
        self._timeout_seconds = timeout_seconds
        self._version = -1
        self._layout: Layout = ()
        self._probe: WeightProbe | None = None

    @property
    def world_size(self) -> int:
        """The learner and all workers."""
        return 1 + self._workers * len(self._stubs)

    def announce(self, version: int, layout: Layout, probe: WeightProbe | None) -> None:
        """Set the next update."""
        self._version, self._layout, self._probe = version, layout, probe

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        """Have every replica join the group; returns once all have.

        Raises:
            JackpotError: a replica did not.
        """
        settings = {name: value for name, value in init_info.items() if name != "rank_offset"}

        def join(index: int) -> rollout_pb2.JoinTransferRequest:
            return rollout_pb2.JoinTransferRequest(
                session=self.session,
                transport=self._transport,
                rank_offset=init_info["rank_offset"] + index * self._workers,
                **settings,
            )

        self._all("JoinTransfer", join)

    def start_weight_update(self) -> None:
        """Announce the update to every replica.

        Raises:
            JackpotError: a replica is gone, or the weights do not fit its model: nothing must be sent.
        """
        tensors = [rollout_pb2.TensorLayout(name=name, dtype=dtype, shape=shape) for name, dtype, shape in self._layout]
        self._stage(start=rollout_pb2.TransferStart(tensors=tensors))

    def update_weights(self, update_info: Any) -> None:
        """Have every replica receive the update; returns once all have all of it.

        Raises:
            EngineError: the update differs from the announced one.
            JackpotError: a replica did not get it.
        """
        layout = list(zip(update_info["names"], update_info["dtype_names"], update_info["shapes"], strict=True))
        if [(name, dtype, list(shape)) for name, dtype, shape in self._layout] != layout:
            raise EngineError("the update differs from the one announced to the replicas.")
        self._stage(update=rollout_pb2.TransferUpdate())

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Have every replica apply the announced version.

        Raises:
            JackpotError: a replica could not.
        """
        self._stage(finish=probe_to_proto(self._probe))

    def _stage(self, **stage: Any) -> None:
        request = rollout_pb2.TransferWeightsRequest(session=self.session, version=self._version, **stage)
        self._all("TransferWeights", lambda index: request)

    def _all(self, method: str, request: Callable[[int], Any]) -> None:
        async def ask() -> list[BaseException | Any]:
            calls = [
                call(getattr(stub, method), request(index), self._timeout_seconds, awaited=f"{method} on {address}")
                for index, (address, stub) in enumerate(self._stubs.items())
            ]
            return await asyncio.gather(*calls, return_exceptions=True)

        future = asyncio.run_coroutine_threadsafe(ask(), self._loop)
        for answer in future.result(self._timeout_seconds + _GRACE_SECONDS):
            if isinstance(answer, JackpotError):
                raise answer
            if isinstance(answer, BaseException):
                raise EngineError(f"{method} failed ({answer!r}).") from answer
