"""A real rollout server on vLLM: gRPC, metrics, damaged weights, a killed engine process."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import torch
from patience import PATIENCE_SECONDS
from rollout_world import RolloutWorld, generate_request, generating, refusal, stop

from jackpot.compute.model_loading import load_causal_lm
from jackpot.rpc.channel import open_channel
from jackpot.rpc.proto import trajectory_from_proto
from jackpot.v1 import rollout_pb2, rollout_pb2_grpc


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A rollout server on vLLM that is ready."""

    def __init__(self, world: RolloutWorld, name: str) -> None:
        self.world, self.name = world, name
        self.metrics_port = free_port()
        self.process = world.start(name, metrics_address=f"127.0.0.1:{self.metrics_port}")
        asyncio.run(world.wait_ready(name))

    def metrics(self) -> dict[str, float]:
        """Every sample at /metrics, by name and labels."""
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=PATIENCE_SECONDS
        ) as answer:
            text = answer.read().decode()
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Iterator[Server]:
    """One server for all tests here; versions only grow."""
    world = RolloutWorld(tmp_path_factory.mktemp("run"), make_model, engine="vllm", max_batch_size=8, max_queue=16)
    world.publish(0)
    server = Server(world, "actor")
    try:
        yield server
        stop(server.process)
    finally:
        server.process.kill()
        server.process.wait()
    assert "engine vllm: asked for by rollout.engine" in world.log("actor")


@pytest.fixture
async def stub(server: Server) -> AsyncIterator[Any]:
    """A client."""
    channel = open_channel(server.world.address("actor"))
    yield rollout_pb2_grpc.RolloutServiceStub(channel)
    await channel.close()


async def _generate(stub: Any, request: rollout_pb2.GenerateRequest, timeout: float = PATIENCE_SECONDS) -> Any:
    return await stub.Generate(request, timeout=timeout)


async def _status(stub: Any) -> Any:
    return await stub.GetStatus(rollout_pb2.RolloutServiceGetStatusRequest(), timeout=PATIENCE_SECONDS)


async def test_a_group_has_the_log_probabilities_of_a_full_forward_pass(server: Server, stub: Any) -> None:
    request = generate_request(1, n=3, temperature=0.7)
    response = await stub.Generate(request, timeout=PATIENCE_SECONDS)
    version = (await _status(stub)).version
    model = load_causal_lm(server.world.model_dir(version), "float32", "cpu")
    prompt = np.frombuffer(request.prompt_token_ids, "<u4")
    for trajectory in (trajectory_from_proto(message) for message in response.trajectories):
        assert [span.version for span in trajectory.version_spans] == [version]
        ids = torch.from_numpy(np.concatenate([prompt, trajectory.token_ids]).astype(np.int64))
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids[None, :-1]).logits[0, 4:] / 0.7, dim=-1)
        expected = logprobs.gather(1, ids[5:, None])[:, 0].numpy()
        np.testing.assert_allclose(trajectory.actor_logprobs, expected, atol=1e-4, rtol=0)


async def test_a_full_server_says_when_to_come_back(stub: Any) -> None:
    busy = [asyncio.create_task(_generate(stub, generate_request(i, n=16, max_tokens=120))) for i in range(4)]
    results = await asyncio.gather(*busy, return_exceptions=True)
    refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert 1 <= len(refused) <= 3
    for error in refused:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(error.trailing_metadata() or ())["retry-after-ms"] == "250"


async def test_a_client_that_goes_away_frees_its_place(stub: Any) -> None:
    call = await generating(stub, n=16, max_tokens=120)
    call.cancel()
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (now := await _status(stub)).num_running + now.num_waiting:
            await asyncio.sleep(0.01)


async def test_a_damaged_version_leaves_the_old_one_serving_and_says_so(server: Server, stub: Any) -> None:
    await stub.Generate(generate_request(6), timeout=PATIENCE_SECONDS)
    held = (await _status(stub)).version
    damaged = held + 1
    server.world.publish(damaged, intact=False)
    assert f"version {held} is held; refused: [{damaged}]" in await refusal(stub, damaged)
    assert server.metrics()['jackpot_weights_refused_total{job_id="rollout-test",role="actor"}'] == 1
    response = await stub.Generate(generate_request(7), timeout=PATIENCE_SECONDS)
    assert {span.version for t in response.trajectories for span in t.version_spans} == {held}
    server.world.publish(damaged + 1)
    response = await stub.Generate(generate_request(8, min_version=damaged + 1), timeout=PATIENCE_SECONDS)
    assert {span.version for t in response.trajectories for span in t.version_spans} == {damaged + 1}


async def test_the_metrics_of_vllm_stand_beside_ours(server: Server, stub: Any) -> None:
    before = server.metrics()
    response = await stub.Generate(generate_request(9, n=4), timeout=PATIENCE_SECONDS)
    sampled = sum(trajectory_from_proto(message).num_tokens for message in response.trajectories)
    after = server.metrics()

    def growth(name: str) -> float:
        (key,) = (key for key in after if key.startswith(name))
        return after[key] - before[key]

    assert growth("jackpot_tokens_generated_total{") == sampled
    assert growth("vllm:generation_tokens_total{") == sampled
    assert [key for key in after if key.startswith("vllm:num_requests_running{")]
    assert [key for key in after if key.startswith("vllm:kv_cache_usage_perc{")]
    assert after['jackpot_weight_version{job_id="rollout-test",role="actor"}'] >= 0


def engine_process(pid: int) -> psutil.Process:
    """vLLM's process, the only child of a server."""
    (child,) = psutil.Process(pid).children()
    return child


async def test_a_killed_engine_ends_the_server_and_its_successor_catches_up(
    tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    world = RolloutWorld(tmp_path / "run", make_model, engine="vllm")
    world.publish(0)
    process = world.start("actor")
    channel = open_channel(world.address("actor"))
    stub = rollout_pb2_grpc.RolloutServiceStub(channel)
    try:
        await world.wait_ready("actor")
        running = await generating(stub, n=64, max_tokens=120)
        os.kill(engine_process(process.pid).pid, signal.SIGKILL)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
        assert process.wait(PATIENCE_SECONDS) == 1
        assert re.search(r"^error: vLLM's engine process has died", world.log("actor"), re.MULTILINE)

        world.publish(4)
        world.publish(5, intact=False)
        process = world.start("actor")
        await world.wait_ready("actor")
        response = await stub.Generate(generate_request(4), timeout=PATIENCE_SECONDS, wait_for_ready=True)
        assert {span.version for t in response.trajectories for span in t.version_spans} == {4}

        # However the server dies, it leaves no engine behind.
        engine = engine_process(process.pid)
        process.kill()
        process.wait()
        engine.wait(timeout=PATIENCE_SECONDS)
    finally:
        await channel.close()
        process.kill()
        process.wait()
