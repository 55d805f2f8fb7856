"""The scorer's gRPC interface: decode, call, encode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jackpot.rpc.proto import group_from_proto, scored_group_to_proto
from jackpot.scorer.engine import ScoringEngine
from jackpot.v1 import scoring_pb2, scoring_pb2_grpc, weights_pb2

if TYPE_CHECKING:
    import grpc

SERVICE_NAME: str = scoring_pb2.DESCRIPTOR.services_by_name["ScoringService"].full_name


class ScoringServicer(scoring_pb2_grpc.ScoringServiceServicer):
    """Scores groups for any caller, on the same code path as the bus worker."""

    def __init__(self, engine: ScoringEngine) -> None:
        self._engine = engine

    async def Score(
        self, request: scoring_pb2.ScoreRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> scoring_pb2.ScoreResponse:
        """Score one group, once a policy version at least as new as its dispatch version is loaded."""
        group = group_from_proto(request.group)
        await self._engine.wait_for_version(group.dispatch_version, _seconds_left(context))
        (scored,) = await self._engine.score([group])
        return scored_group_to_proto(scored)

    async def LoadWeights(
        self, request: scoring_pb2.ScoringServiceLoadWeightsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> scoring_pb2.ScoringServiceLoadWeightsResponse:
        """Answer once a policy version at least as new as the requested one is loaded; 0 is the newest in the store."""
        await self._engine.refresh()
        await self._engine.wait_for_version(request.weights.min_version, _seconds_left(context))
        held = weights_pb2.LoadWeightsResponse(version=self._engine.version)
        return scoring_pb2.ScoringServiceLoadWeightsResponse(weights=held)

    async def GetStatus(
        self, request: scoring_pb2.ScoringServiceGetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> scoring_pb2.ScoringServiceGetStatusResponse:
        """The loaded version (−1 before the first), its λ and the tokens scored so far."""
        version = self._engine.version
        return scoring_pb2.ScoringServiceGetStatusResponse(
            version=-1 if version is None else version,
            obrs_lambda=self._engine.obrs_lambda,
            tokens_scored=self._engine.tokens_scored,
        )


def _seconds_left(context: grpc.aio.ServicerContext[Any, Any]) -> float:
    remaining = context.time_remaining()
    return remaining if remaining is not None else 0.0
