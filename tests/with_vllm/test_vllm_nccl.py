"""The NCCL broadcast itself, from one GPU to a replica on another: needs two, since NCCL refuses to share one."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from patience import PATIENCE_SECONDS
from rollout_world import RolloutWorld, generate_request

from jackpot.compute.model_loading import load_causal_lm
from jackpot.compute.model_weights import copy_state
from jackpot.learner.publishing.broadcast import Outcome, Sender, WeightBroadcaster
from jackpot.learner.publishing.replica_client import ReplicaClient
from jackpot.rpc.channel import open_channel
from jackpot.rpc.proto import trajectory_from_proto
from jackpot.v1 import rollout_pb2, rollout_pb2_grpc


def _is_gpu_build() -> bool:
    try:
        return "cpu" not in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices: NCCL goes from one to another")
@pytest.mark.skipif(not _is_gpu_build(), reason="needs vLLM's GPU build: pip install 'jackpot[vllm]'")
async def test_versions_arrive_by_nccl(
    tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = RolloutWorld(tmp_path, make_model, engine="vllm", max_batch_size=8, vllm={"gpu_memory_fraction": 0.3})
    world.publish(0)
    with monkeypatch.context() as of_the_replica:
        of_the_replica.setenv("CUDA_VISIBLE_DEVICES", "1")
        process = world.start("actor")
    await world.wait_ready("actor")
    outcomes: list[Outcome] = []

    def open_sender(client: ReplicaClient, host: str, port: int) -> Sender:
        from jackpot.learner.publishing.vllm_sender import VllmSender

        device = torch.device("cuda", 0)
        return VllmSender(
            client, transport="nccl", host=host, port=port, device=device, timeout_seconds=PATIENCE_SECONDS
        )

    address = world.address("actor")
    broadcaster = WeightBroadcaster(
        {address: open_channel(address)},
        open_sender,
        transport="nccl",
        workers=1,
        timeout_seconds=PATIENCE_SECONDS,
        count=outcomes.append,
    )
    channel = open_channel(address)
    stub = rollout_pb2_grpc.RolloutServiceStub(channel)  # type: ignore[no-untyped-call]
    try:
        for version in (1, 2, 3):
            model = load_causal_lm(world.model_dir(version), "float32", "cpu")
            assert await asyncio.to_thread(broadcaster.send, version, copy_state(model), None) == "sent"
            status = await stub.GetStatus(rollout_pb2.RolloutServiceGetStatusRequest(), timeout=PATIENCE_SECONDS)
            assert status.version == version
            request = generate_request(version, max_tokens=20, temperature=1.0)
            response = await stub.Generate(request, timeout=PATIENCE_SECONDS)
            prompt = np.frombuffer(request.prompt_token_ids, "<u4")
            for trajectory in (trajectory_from_proto(message) for message in response.trajectories):
                assert [span.version for span in trajectory.version_spans] == [version]
                ids = torch.from_numpy(np.concatenate([prompt, trajectory.token_ids]).astype(np.int64))
                with torch.no_grad():
                    logits = model(input_ids=ids[None, :-1]).logits[0, len(prompt) - 1 :]
                expected = torch.log_softmax(logits, -1).gather(1, ids[len(prompt) :, None])[:, 0].numpy()
                # A GPU's matrix products round otherwise than a CPU's.
                np.testing.assert_allclose(trajectory.actor_logprobs, expected, atol=5e-3)
    finally:
        await broadcaster.close()
        await channel.close()
        process.kill()
        process.wait()
    assert outcomes == ["sent"] * 3
