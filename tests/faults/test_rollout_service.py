"""Damaged weights and killed servers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from patience import PATIENCE_SECONDS, TEST_SECONDS
from rollout_world import RolloutWorld, generate_request, generating, refusal, stop

from jackpot.rpc.channel import open_channel
from jackpot.v1 import rollout_pb2_grpc

pytestmark = pytest.mark.timeout(TEST_SECONDS)


async def versions_of(stub: Any, group: int, min_version: int = 0) -> set[int]:
    """The versions that a group sampled now has."""
    response = await stub.Generate(
        generate_request(group, min_version=min_version), timeout=PATIENCE_SECONDS, wait_for_ready=True
    )
    return {span.version for trajectory in response.trajectories for span in trajectory.version_spans}


async def test_damaged_weights_and_a_kill_leave_a_replica_that_catches_up(
    tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    world = RolloutWorld(tmp_path / "run", make_model)
    process = world.start("actor")
    channel = open_channel(world.address("actor"))
    stub = rollout_pb2_grpc.RolloutServiceStub(channel)
    try:
        # Alive, but not ready before there is a version, which a group waits for.
        await world.wait_ready("actor", "liveness")
        first = asyncio.create_task(versions_of(stub, 0))
        await asyncio.to_thread(world.publish, 0)
        assert await first == {0}
        await world.wait_ready("actor")

        # A damaged version is refused and the old one keeps serving.
        world.publish(1, intact=False)
        assert "version 1 of the actor's weights (version 0 is held; refused: [1])" in await refusal(stub, 1)
        assert await versions_of(stub, 2) == {0}

        # Killed in the middle of a request, which fails as retryable.
        running = await generating(stub, n=64, max_tokens=120)
        process.kill()
        process.wait(PATIENCE_SECONDS)
        try:
            await running
            raise AssertionError("a killed server answered")
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "version 1 is refused, version 0 stays in use" in world.log("actor")

        # Its successor on the same socket finds the newest intact version by itself: here 2, not the damaged 3.
        world.publish(2)
        world.publish(3, intact=False)
        process = world.start("actor")
        await world.wait_ready("actor")
        assert await versions_of(stub, 4) == {2}
        world.publish(4)
        assert await versions_of(stub, 5, min_version=4) == {4}
        stop(process)
        assert "version 3 is refused, version -1 stays in use" in world.log("actor")
    finally:
        await channel.close()
        process.kill()
        process.wait()
