"""What the learner does to broadcast a version, against real gRPC servers with a scripted replica behind them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from jackpot.config import parse_job
from jackpot.config.environment import ServiceEnvironment
from jackpot.errors import ConfigError, WeightCorruptError
from jackpot.learner.publishing.broadcast import Outcome, WeightBroadcaster, connect_broadcaster, own_host
from jackpot.learner.publishing.replica_client import ReplicaClient
from jackpot.rpc.channel import open_channel
from jackpot.rpc.proto import probe_from_proto
from jackpot.rpc.server import RpcServer, create_server
from jackpot.storage.weight_probe import WeightProbe
from jackpot.v1 import rollout_pb2, rollout_pb2_grpc

STATE = {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}
LAYOUT = [("a", "float32", [2, 3]), ("b", "bfloat16", [4])]
PROBE = WeightProbe([3, 4, 5], [-0.1, -2.3], [-0.2, -2.5], "bfloat16")
PATIENCE = 10.0


class ScriptedReplica(rollout_pb2_grpc.RolloutServiceServicer):
    """Writes down what it is asked; ``refuse`` names a stage to fail."""

    def __init__(self, events: list[str]) -> None:
        self.events = events
        self.session = ""
        self.version = -1
        self.ranks: list[tuple[int, int]] = []
        self.layout: list[Any] = []
        self.probe: WeightProbe | None = None
        self.refuse = ""
        self.broadcast = threading.Event()

    async def GetStatus(self, request: Any, context: Any) -> Any:
        return rollout_pb2.RolloutServiceGetStatusResponse(version=self.version, transfer_session=self.session)

    async def JoinTransfer(self, request: Any, context: Any) -> Any:
        self.session = request.session
        self.ranks.append((request.rank_offset, request.world_size))
        self.events.append("join")
        return rollout_pb2.JoinTransferResponse()

    async def TransferWeights(self, request: Any, context: Any) -> Any:
        stage = request.WhichOneof("stage")
        self.events.append(stage)
        assert request.session == self.session
        if stage == self.refuse:
            raise WeightCorruptError(f"scripted to refuse {stage}")
        if stage == "start":
            self.layout = [(t.name, t.dtype, list(t.shape)) for t in request.start.tensors]
        elif stage == "update":
            await asyncio.to_thread(self.broadcast.wait, PATIENCE)  # as one does that waits for the bytes
            self.events.append("received")
        else:
            self.version = request.version
            self.probe = probe_from_proto(request.finish)
        return rollout_pb2.TransferWeightsResponse(version=self.version)


class ScriptedSender:
    """Calls the client as vLLM's NCCL engine does, and lets the replicas have the bytes."""

    def __init__(self, client: ReplicaClient, host: str, port: int, replicas: list[ScriptedReplica]) -> None:
        self.client, self.replicas = client, replicas
        self.closed = False
        info = {"master_address": host, "master_port": port, "rank_offset": 1, "world_size": client.world_size}
        client.init_weight_transfer_engine(info | {"packed": True, "packed_buffer_size_bytes": 1 << 20})

    def send(self, version: int, state: Mapping[str, torch.Tensor], probe: WeightProbe | None) -> None:
        self.client.announce(version, LAYOUT, probe)
        self.client.start_weight_update()
        names, dtypes, shapes = ([row[i] for row in LAYOUT] for i in range(3))
        update = {"names": names, "dtype_names": dtypes, "shapes": shapes}
        errors: list[BaseException] = []

        def receive() -> None:
            try:
                self.client.update_weights(update)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=receive)
        thread.start()
        for replica in self.replicas:
            replica.events.append("broadcast")
            replica.broadcast.set()
        thread.join()
        if errors:
            raise errors[0]
        self.client.finish_weight_update()

    def close(self) -> None:
        self.closed = True


class World:
    """Two replicas and the broadcaster."""

    def __init__(self, root: Path) -> None:
        self.events: list[list[str]] = [[], []]
        self.replicas = [ScriptedReplica(events) for events in self.events]
        self.addresses = [f"unix:{root}/{i}.sock" for i in range(2)]
        self.servers: list[RpcServer] = []
        self.senders: list[ScriptedSender] = []
        self.outcomes: list[Outcome] = []
        self.hang: threading.Event | None = None

    async def serve(self, index: int) -> RpcServer:
        replica = self.replicas[index]

        def register(server: grpc.aio.Server) -> None:
            rollout_pb2_grpc.add_RolloutServiceServicer_to_server(replica, server)  # type: ignore[no-untyped-call]

        server = create_server(self.addresses[index], register, ["jackpot.v1.RolloutService"])
        await server.start()
        self.servers.append(server)
        return server

    def broadcaster(self, timeout_seconds: float = PATIENCE) -> WeightBroadcaster:
        def open_sender(client: ReplicaClient, host: str, port: int) -> ScriptedSender:
            if self.hang is not None:
                self.hang.wait(PATIENCE)
            sender = ScriptedSender(client, host, port, self.replicas)
            self.senders.append(sender)
            return sender

        return WeightBroadcaster(
            {address: open_channel(address) for address in self.addresses},
            open_sender,
            transport="nccl",
            workers=2,
            timeout_seconds=timeout_seconds,
            count=self.outcomes.append,
        )

    async def send(self, broadcaster: WeightBroadcaster, version: int) -> Outcome:
        for replica in self.replicas:
            replica.broadcast.clear()
        return await asyncio.to_thread(broadcaster.send, version, STATE, PROBE)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    yield world
    for server in world.servers:
        await server.stop(0)


async def test_replicas_receive_while_the_learner_broadcasts_and_join_once(world: World) -> None:
    await world.serve(0)
    await world.serve(1)
    broadcaster = world.broadcaster()
    assert await world.send(broadcaster, 7) == "sent"
    assert await world.send(broadcaster, 8) == "sent"
    for events, replica in zip(world.events, world.replicas, strict=True):
        # The learner broadcasts once the call that receives has been made, or just before it arrives; never after.
        assert [e for e in events if e != "broadcast"] == ["join", *(["start", "update", "received", "finish"] * 2)]
        assert events.count("broadcast") == 2
        assert events.index("start") < events.index("broadcast") < events.index("received")
        assert replica.layout == LAYOUT
        assert replica.probe == PROBE
        assert replica.version == 8
    # Two workers each, after the learner's rank 0.
    assert [replica.ranks for replica in world.replicas] == [[(1, 5)], [(3, 5)]]
    assert len({replica.session for replica in world.replicas}) == 1
    await broadcaster.close()
    assert world.senders[0].closed


async def test_without_replicas_the_store_has_the_version(world: World) -> None:
    broadcaster = world.broadcaster()
    started = time.monotonic()
    assert await world.send(broadcaster, 1) == "skipped"
    assert time.monotonic() - started < PATIENCE
    await broadcaster.close()


async def test_the_group_is_made_anew_when_a_replica_comes_or_has_restarted(world: World) -> None:
    await world.serve(0)
    broadcaster = world.broadcaster()
    assert await world.send(broadcaster, 1) == "sent"
    assert world.replicas[0].ranks == [(1, 3)]
    await world.serve(1)
    version, deadline = 1, time.monotonic() + PATIENCE
    while not world.replicas[1].ranks:  # gRPC waits a little before it looks for a server again
        assert time.monotonic() < deadline
        version += 1
        assert await world.send(broadcaster, version) == "sent"
    assert [replica.ranks[-1] for replica in world.replicas] == [(1, 5), (3, 5)]
    world.replicas[1].session = ""  # as after a restart
    assert await world.send(broadcaster, version + 1) == "sent"
    assert [replica.version for replica in world.replicas] == [version + 1] * 2
    assert [sender.closed for sender in world.senders] == [True, True, False]
    await broadcaster.close()


@pytest.mark.parametrize("stage", ["start", "update", "finish"])
async def test_a_replica_that_refuses_costs_a_version_and_a_new_group(world: World, stage: str) -> None:
    await world.serve(0)
    await world.serve(1)
    world.replicas[1].refuse = stage
    broadcaster = world.broadcaster()
    assert await world.send(broadcaster, 1) == "failed"
    if stage == "start":
        assert "broadcast" not in world.events[0]  # nothing was sent
    world.replicas[1].refuse = ""
    assert await world.send(broadcaster, 2) == "sent"
    assert [sender.closed for sender in world.senders] == [True, False]
    await broadcaster.close()


async def test_after_failures_in_a_row_more_and_more_versions_go_through_the_store_alone(world: World) -> None:
    await world.serve(0)
    world.replicas[0].refuse = "start"
    broadcaster = world.broadcaster()
    outcomes = [await world.send(broadcaster, version) for version in range(1, 9)]
    assert outcomes == ["failed", "failed", "skipped", "failed", "skipped", "skipped", "skipped", "failed"]
    assert world.outcomes == outcomes
    await broadcaster.close()


async def test_a_broadcast_that_hangs_is_left_behind(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jackpot.learner.publishing.broadcast.STATUS_SECONDS", 0.3)
    await world.serve(0)
    world.hang = threading.Event()
    broadcaster = world.broadcaster(timeout_seconds=0.2)
    started = time.monotonic()
    assert await world.send(broadcaster, 1) == "failed"
    assert time.monotonic() - started < 3
    world.hang.set()
    world.hang = None
    broadcaster = world.broadcaster()
    assert await world.send(broadcaster, 2) == "sent"
    await broadcaster.close()


def test_the_learner_finds_the_address_that_replicas_reach_it_at() -> None:
    assert own_host(["unix:/tmp/a.sock", "127.0.0.1:5", "[::1]:5", "localhost:9"]) == "127.0.0.1"
    assert own_host(["192.0.2.1:50051"]).count(".") == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["weights.transport=nccl", "rollout.engine=transformers"], "is beyond the transformers engine"),
        (["weights.transport=nccl", "rollout.device=cpu"], "goes from GPU to GPU"),
        (["weights.transport=nccl", "learner.device=cpu"], "goes from GPU to GPU"),
        (["weights.transport=rdma"], r"weights\.transport"),
    ],
)
def test_transports_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    job = {"policy": {"model": "m"}, "actor": "policy", "task": {"name": "complement"}}
    with pytest.raises(ConfigError, match=message):
        parse_job(job, overrides)


async def test_a_learner_that_cannot_broadcast_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = parse_job({"policy": {"model": "m"}, "actor": "policy", "task": {"name": "complement"}})
    environment = ServiceEnvironment(run_dir=tmp_path, job_id="j")
    cpu, count = torch.device("cpu"), lambda outcome: None
    assert connect_broadcaster(environment, job, cpu, count) is None

    def refusal(transport: str, installed: bool) -> str:
        found: Callable[[str], Any] = lambda name: object() if installed else None  # noqa: E731
        monkeypatch.setattr("importlib.util.find_spec", found)
        weights = job.weights.model_copy(update={"transport": transport})
        with pytest.raises(ConfigError) as refused:
            connect_broadcaster(environment, job.model_copy(update={"weights": weights}), cpu, count)
        return str(refused.value)

    assert "the learner broadcasts with vLLM, which is not installed" in refusal("gloo", installed=False)
    assert "the learner is on cpu, and NCCL goes from GPU to GPU" in refusal("nccl", installed=True)
    assert "is not told where the rollout replicas are" in refusal("gloo", installed=True)
