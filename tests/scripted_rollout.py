"""A rollout server without a model: real gRPC, real health checks, answers by script.

It samples "tokens" from its own random generator and stamps them with a version that the test sets. Failures are
scripted per call. Also runs as a process of its own, to be killed: ``python scripted_rollout.py <address> <token>``.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence

import grpc
import numpy as np

from jackpot.rpc.proto import trajectory_to_proto
from jackpot.rpc.server import RpcServer, create_server
from jackpot.trajectory import Trajectory, VersionSpan
from jackpot.v1 import rollout_pb2, rollout_pb2_grpc, weights_pb2

SERVICE = "jackpot.v1.RolloutService"
Request = rollout_pb2.GenerateRequest
# Completion ids of trajectory i of a request.
Completion = Callable[[Request, int], Sequence[int]]
Before = Callable[[Request], Awaitable[None]]


class ScriptedRollout(rollout_pb2_grpc.RolloutServiceServicer):
    """Answers every request.

    Args:
        complete: the completion's token ids; by default eight random ids from 3 to 20 and the end of sequence, 1.
        version: the version stamped on tokens.
    """

    def __init__(self, complete: Completion | None = None, version: Callable[[], int] = lambda: 0) -> None:
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.before: Before | None = None  # awaited first: may wait, or raise what the call fails with
        self.complete = complete or _random_tokens
        self.version = version
        self.running = 0
        self.most_running = 0

    async def Generate(self, request: Request, context: grpc.aio.ServicerContext) -> rollout_pb2.GenerateResponse:
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            if self.before is not None:
                await self.before(request)
        except asyncio.CancelledError:
            self.cancelled.append(request.group_id)
            raise
        finally:
            self.running -= 1
        indices = range(request.num_trajectories)
        return rollout_pb2.GenerateResponse(trajectories=[self._trajectory(request, index) for index in indices])

    async def LoadWeights(
        self, request: rollout_pb2.RolloutServiceLoadWeightsRequest, context: grpc.aio.ServicerContext
    ) -> rollout_pb2.RolloutServiceLoadWeightsResponse:
        while self.version() < request.weights.min_version:
            await asyncio.sleep(0.01)
        weights = weights_pb2.LoadWeightsResponse(version=self.version())
        return rollout_pb2.RolloutServiceLoadWeightsResponse(weights=weights)

    def _trajectory(self, request: Request, index: int):
        ids = np.asarray(self.complete(request, index), dtype=np.uint32)
        width = request.sampling.top_logprobs
        stopped = len(ids) < request.sampling.max_tokens
        return trajectory_to_proto(
            Trajectory(
                trajectory_id=f"{request.group_id}#{index}",
                token_ids=ids,
                actor_logprobs=np.full(len(ids), -1.0, np.float32),
                topk_ids=np.tile(np.arange(width, dtype=np.uint32), (len(ids), 1)),
                topk_logprobs=np.full((len(ids), width), -4.0, np.float16),
                version_spans=(VersionSpan(self.version(), 0, len(ids)),),
                finish_reason="stop" if stopped else "length",
            )
        )


async def start_scripted(address: str, servicer: ScriptedRollout) -> RpcServer:
    """Serve, ready from the start."""
    server = create_server(
        address,
        lambda grpc_server: rollout_pb2_grpc.add_RolloutServiceServicer_to_server(servicer, grpc_server),
        [SERVICE],
    )
    await server.start()
    await server.health.set_ready(True)
    return server


def _random_tokens(request: Request, index: int) -> Sequence[int]:
    generator = np.random.default_rng([request.sampling.seed, index])
    return [*generator.integers(3, 20, size=8), 1][: request.sampling.max_tokens]


async def _serve(address: str, token: int) -> None:
    server = await start_scripted(address, ScriptedRollout(lambda request, index: [token, 1]))
    print("ready", server.address, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
