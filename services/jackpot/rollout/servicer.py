"""gRPC face of the rollout service: decode, call, encode."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from jackpot.errors import ConfigError
from jackpot.rollout.engine import GroupRequest, RolloutEngine, Sampling, WeightReceiver
from jackpot.rollout.weight_follower import WeightFollower
from jackpot.rpc.proto import ids_from_bytes, probe_from_proto, trajectory_to_proto
from jackpot.telemetry.activity import Activity
from jackpot.trajectory import Role
from jackpot.v1 import rollout_pb2, rollout_pb2_grpc, weights_pb2

if TYPE_CHECKING:
    import grpc

SERVICE_NAME: str = rollout_pb2.DESCRIPTOR.services_by_name["RolloutService"].full_name

# Waits end a little before the caller's deadline, so that the error can say what was awaited.
_PART_OF_DEADLINE = 0.95


class RolloutServicer(rollout_pb2_grpc.RolloutServiceServicer):
    """Samples groups with the weights of one role."""

    def __init__(self, engine: RolloutEngine, follower: WeightFollower, role: Role, activity: Activity) -> None:
        self._engine = engine
        self._follower = follower
        self._role = role
        self._activity = activity

    async def Generate(
        self, request: rollout_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> rollout_pb2.GenerateResponse:
        """Sample one group, once a version no older than ``min_version`` is held."""
        group = _group_request(request)
        self._engine.check(group)
        # At least version 0: the model directory's own weights are no version.
        with self._activity.doing("wait_weights"):
            await self._follower.wait_for(max(0, request.min_version), _seconds_left(context))
        with self._activity.doing("generate"):
            trajectories = await self._engine.generate(group)
        return rollout_pb2.GenerateResponse(trajectories=[trajectory_to_proto(t) for t in trajectories])

    async def LoadWeights(
        self, request: rollout_pb2.RolloutServiceLoadWeightsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> rollout_pb2.RolloutServiceLoadWeightsResponse:
        """Answer once a version no older than the requested one is held; 0 is the newest in the store."""
        wanted = request.weights.min_version or max(0, await self._follower.newest())
        held = await self._follower.wait_for(wanted, _seconds_left(context))
        return rollout_pb2.RolloutServiceLoadWeightsResponse(weights=weights_pb2.LoadWeightsResponse(version=held))

    async def GetStatus(
        self, request: rollout_pb2.RolloutServiceGetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> rollout_pb2.RolloutServiceGetStatusResponse:
        """Engine, role, the version held (−1 before the first) and load."""
        status = self._engine.status()
        return rollout_pb2.RolloutServiceGetStatusResponse(
            engine=self._engine.name,
            role=self._role,
            version=self._engine.version,
            num_running=status.num_running,
            num_waiting=status.num_waiting,
            tokens_generated=status.tokens_generated,
            transfer_session=self._engine.receiver.session if self._engine.receiver else "",
        )

    async def JoinTransfer(
        self, request: rollout_pb2.JoinTransferRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> rollout_pb2.JoinTransferResponse:
        """Join the group in which the learner broadcasts weights."""
        info = {
            "transport": request.transport,
            "master_address": request.master_address,
            "master_port": request.master_port,
            "rank_offset": request.rank_offset,
            "world_size": request.world_size,
            "packed": request.packed,
            "packed_buffer_size_bytes": request.packed_buffer_size_bytes,
            "packed_num_buffers": request.packed_num_buffers,
        }
        await self._receiver().join(request.session, info, _seconds_left(context))
        return rollout_pb2.JoinTransferResponse()

    async def TransferWeights(
        self, request: rollout_pb2.TransferWeightsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> rollout_pb2.TransferWeightsResponse:
        """One stage of a version that the learner broadcasts."""
        receiver, stage = self._receiver(), request.WhichOneof("stage")
        if stage == "start":
            layout = [(tensor.name, tensor.dtype, list(tensor.shape)) for tensor in request.start.tensors]
            await receiver.start(request.session, request.version, layout)
        elif stage == "update":
            await receiver.update(request.session, request.version, _seconds_left(context))
        elif stage == "finish":
            started, before = time.monotonic(), self._engine.version
            if await receiver.finish(request.session, request.version, probe_from_proto(request.finish)) > before:
                await self._follower.took(self._engine.version, time.monotonic() - started)
        else:
            raise ConfigError("stage", None, "is none of start, update, finish", "Send one.")
        return rollout_pb2.TransferWeightsResponse(version=self._engine.version)

    def _receiver(self) -> WeightReceiver:
        if self._engine.receiver is None:
            problem = f"the {self._engine.name} engine takes weights only from the store"
            raise ConfigError("weights.transport", "nccl", problem, "Set rollout.engine to vllm, or use store.")
        return self._engine.receiver


def _group_request(request: rollout_pb2.GenerateRequest) -> GroupRequest:
    if not request.group_id:
        raise ConfigError("group_id", "", "is empty", "Trajectories are named after it: send one.")
    sampling = request.sampling
    return GroupRequest(
        group_id=request.group_id,
        prompt_token_ids=ids_from_bytes(request.prompt_token_ids, "prompt_token_ids"),
        num_trajectories=request.num_trajectories,
        sampling=Sampling(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            stop_token_ids=tuple(sampling.stop_token_ids),
            top_logprobs=sampling.top_logprobs,
            seed=sampling.seed,
        ),
    )


def _seconds_left(context: grpc.aio.ServicerContext[Any, Any]) -> float:
    remaining = context.time_remaining()
    return _PART_OF_DEADLINE * (remaining if remaining is not None else 0.0)
