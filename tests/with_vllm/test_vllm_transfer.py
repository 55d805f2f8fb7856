"""Versions broadcast to real vLLM servers over our gRPC, by vLLM's own trainer side; gloo carries the bytes."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

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


class Fleet:
    """Rollout servers, and a learner that broadcasts to them."""

    def __init__(self, world: RolloutWorld, names: list[str]) -> None:
        self.world = world
        self.outcomes: list[Outcome] = []
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.channels = {name: open_channel(world.address(name)) for name in names}
        self.stubs = {
            name: rollout_pb2_grpc.RolloutServiceStub(channel)  # type: ignore[no-untyped-call]
            for name, channel in self.channels.items()
        }
        self.broadcaster = WeightBroadcaster(
            {world.address(name): open_channel(world.address(name)) for name in names},
            _open_sender,
            transport="gloo",
            workers=1,
            timeout_seconds=PATIENCE_SECONDS,
            count=self.outcomes.append,
        )

    async def start(self, name: str) -> None:
        self.processes[name] = self.world.start(name)
        await self.world.wait_ready(name)

    async def send(self, version: int, **changes: torch.Tensor) -> Outcome:
        state = copy_state(load_causal_lm(self.world.model_dir(version), "float32", "cpu")) | changes
        return await asyncio.to_thread(self.broadcaster.send, version, state, None)

    async def status(self, name: str) -> Any:
        return await self.stubs[name].GetStatus(rollout_pb2.RolloutServiceGetStatusRequest(), timeout=PATIENCE_SECONDS)

    async def worst_error(self, name: str, number: int, *, min_version: int = 0, max_tokens: int = 20) -> float:
        """Of the log-probabilities of a group, each token's against a forward pass of its version."""
        request = generate_request(number, n=2, max_tokens=max_tokens, temperature=1.0)
        request.min_version = min_version
        response = await self.stubs[name].Generate(request, timeout=PATIENCE_SECONDS)
        prompt = np.frombuffer(request.prompt_token_ids, "<u4")
        worst = 0.0
        for trajectory in (trajectory_from_proto(message) for message in response.trajectories):
            ids = torch.from_numpy(np.concatenate([prompt, trajectory.token_ids]).astype(np.int64))
            for span in trajectory.version_spans:
                model = load_causal_lm(self.world.model_dir(span.version), "float32", "cpu")
                with torch.no_grad():
                    logits = model(input_ids=ids[None, :-1]).logits[0, len(prompt) - 1 :]
                expected = torch.log_softmax(logits, -1).gather(1, ids[len(prompt) :, None])[:, 0].numpy()
                errors = np.abs(trajectory.actor_logprobs - expected)[span.start : span.end]
                worst = max(worst, float(errors.max()))
        return worst

    async def close(self) -> None:
        await self.broadcaster.close()
        for channel in self.channels.values():
            await channel.close()
        for process in self.processes.values():
            process.kill()
            process.wait()


def _open_sender(client: ReplicaClient, host: str, port: int) -> Sender:
    from jackpot.learner.publishing.vllm_sender import VllmSender

    device = torch.device("cpu")
    return VllmSender(client, transport="gloo", host=host, port=port, device=device, timeout_seconds=PATIENCE_SECONDS)


@pytest.fixture
async def fleet(tmp_path: Path, make_model: Callable[..., Path]) -> AsyncIterator[Fleet]:
    """Two servers' names, and no server yet."""
    fleet = Fleet(RolloutWorld(tmp_path, make_model, engine="vllm", max_batch_size=8), ["early", "late"])
    yield fleet
    await fleet.close()


async def test_versions_are_broadcast_under_load_and_who_misses_one_has_it_from_the_store(fleet: Fleet) -> None:
    fleet.world.publish(0)
    assert await fleet.send(0) == "skipped"  # nobody is there
    await fleet.start("early")

    finished = asyncio.Event()
    errors: list[float] = []

    async def keep_asking() -> None:
        while not finished.is_set():
            errors.append(await fleet.worst_error("early", len(errors), max_tokens=40))

    asking = asyncio.create_task(keep_asking())
    for version in (1, 2, 3):
        assert await fleet.send(version) == "sent"
        assert (await fleet.status("early")).version == version  # the store has none of these
        answered = len(errors)
        while len(errors) < answered + 2:
            await asyncio.sleep(0.01)
    finished.set()
    await asking
    assert max(errors) < 1e-3
    session = (await fleet.status("early")).transfer_session
    assert session

    # One that comes later is not in the group: it starts from the store, and is in the next group.
    fleet.world.publish(3)
    await fleet.start("late")
    late = await fleet.status("late")
    assert (late.version, late.transfer_session) == (3, "")
    assert await fleet.send(4) == "sent"
    statuses = [await fleet.status(name) for name in ("early", "late")]
    assert [status.version for status in statuses] == [4, 4]
    assert len({status.transfer_session for status in statuses} - {session}) == 1
    assert await fleet.worst_error("late", 7, min_version=4) < 1e-3

    # Weights of another model are refused before anything is sent; everybody goes on with what they have.
    assert await fleet.send(5, **{"model.norm.weight": torch.zeros(3)}) == "failed"
    assert [(await fleet.status(name)).version for name in ("early", "late")] == [4, 4]
    assert await fleet.worst_error("early", 8) < 1e-3
    fleet.world.publish(5)
    assert await fleet.worst_error("early", 9, min_version=5) < 1e-3  # from the store

    # A server that is gone does not keep the others from the next version.
    fleet.processes["late"].send_signal(signal.SIGKILL)
    fleet.processes["late"].wait()
    assert await fleet.send(6) == "sent"
    assert (await fleet.status("early")).version == 6
    assert fleet.outcomes == ["skipped", "sent", "sent", "sent", "sent", "failed", "sent"]


async def test_a_learner_that_dies_in_a_broadcast_leaves_a_server_that_serves(fleet: Fleet) -> None:
    fleet.world.publish(0)
    await fleet.start("early")
    assert await fleet.send(1) == "sent"
    session, stub = (await fleet.status("early")).transfer_session, fleet.stubs["early"]
    state = copy_state(load_causal_lm(fleet.world.model_dir(2), "float32", "cpu"))
    tensors = [rollout_pb2.TensorLayout(name=n, dtype="float32", shape=list(t.shape)) for n, t in state.items()]
    start = rollout_pb2.TransferStart(tensors=tensors)
    request = rollout_pb2.TransferWeightsRequest(session=session, version=2, start=start)
    assert (await stub.TransferWeights(request, timeout=PATIENCE_SECONDS)).version == 1
    # Nothing is ever sent.
    request = rollout_pb2.TransferWeightsRequest(session=session, version=2, update=rollout_pb2.TransferUpdate())
    update = asyncio.ensure_future(stub.TransferWeights(request, timeout=5.0))
    assert await fleet.worst_error("early", 0) < 1e-3  # samples while it waits
    with pytest.raises(Exception, match=r"waited .* for version 2 from the learner"):
        await update
    assert (await fleet.status("early")).transfer_session == ""
    assert (await fleet.status("early")).version == 1
    fleet.world.publish(2)
    assert await fleet.worst_error("early", 1, min_version=2) < 1e-3
    assert await fleet.send(3) == "sent"
    assert await fleet.worst_error("early", 2, min_version=3) < 1e-3
