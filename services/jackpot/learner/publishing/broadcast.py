"""Broadcasts weight versions to the rollout replicas before the store has them.

The store receives every version as well: scorers, evaluators and restarted processes read it there, and so does a
replica that joins late or that a broadcast missed. Nothing here blocks or fails the job: a broadcast has a deadline,
and errors are logged and counted.
"""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

import grpc
import torch
from torch import Tensor

from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment
from jackpot.errors import ConfigError, DeadlineError, JackpotError
from jackpot.learner.publishing.replica_client import ReplicaClient
from jackpot.rpc.channel import call, open_channel
from jackpot.storage.weight_probe import WeightProbe
from jackpot.v1 import rollout_pb2, rollout_pb2_grpc

LOG = logging.getLogger(__name__)
Result = TypeVar("Result")

Outcome = Literal["sent", "failed", "skipped"]
STATUS_SECONDS = 5.0
# After n failures in a row, 2ⁿ versions go only through the store, up to this many.
LONGEST_PAUSE = 64


class Sender(Protocol):
    """The learner's end of one broadcast group."""

    def send(self, version: int, state: Mapping[str, Tensor], probe: WeightProbe | None) -> None:
        """Send a version to every replica of the group; raises if one does not hold it afterwards."""

    def close(self) -> None:
        """Leave the group, even in the middle of a broadcast."""


OpenSender = Callable[[ReplicaClient, str, int], Sender]


class WeightBroadcaster:
    """Sends versions to the replicas that answer. Create it on the event loop; :meth:`send` blocks.

    Args:
        channels: to the rollout replicas, by address.
        open_sender: creates the learner's end from the replicas, this host and a free port; blocks until all joined.
        transport: ``nccl`` or ``gloo``.
        workers: processes of each replica that hold a part of the model.
        timeout_seconds: for joining, and for each version.
        count: receives the outcome of each version.
    """

    def __init__(
        self,
        channels: Mapping[str, grpc.aio.Channel],
        open_sender: OpenSender,
        *,
        transport: str,
        workers: int,
        timeout_seconds: float,
        count: Callable[[Outcome], object],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._channels = channels
        self._stubs = {
            address: rollout_pb2_grpc.RolloutServiceStub(channel)  # type: ignore[no-untyped-call]
            for address, channel in channels.items()
        }
        self._open_sender = open_sender
        self._transport = transport
        self._workers = workers
        self._timeout_seconds = timeout_seconds
        self._count = count
        self._client: ReplicaClient | None = None
        self._sender: Sender | None = None
        self._failures = 0
        self._pause = 0  # versions to leave to the store

    def send(self, version: int, state: Mapping[str, Tensor], probe: WeightProbe | None) -> Outcome:
        """Broadcast a version to every replica that answers; returns the outcome. Never raises, never hangs."""
        outcome = self._send(version, state, probe)
        self._count(outcome)
        return outcome

    async def close(self) -> None:
        """Leave the group, close channels."""
        await asyncio.to_thread(self._leave)
        for channel in self._channels.values():
            await channel.close()

    def _send(self, version: int, state: Mapping[str, Tensor], probe: WeightProbe | None) -> Outcome:
        if self._pause:
            self._pause -= 1
            return "skipped"
        sessions = self._sessions()
        if not sessions:
            self._leave()
            LOG.info("no replica answers yet to receive version %d; the store has it", version)
            return "skipped"
        started = time.monotonic()
        # A join and a broadcast may each use up their own deadline; NCCL has none.
        seconds = 2 * self._timeout_seconds + STATUS_SECONDS
        try:
            _within(
                seconds, lambda: self._to_all(sessions, version, state, probe), f"the broadcast of version {version}"
            )
        except (JackpotError, RuntimeError, OSError, ValueError, TimeoutError) as error:
            self._leave()
            self._failures += 1
            self._pause = min(2 ** (self._failures - 1) - 1, LONGEST_PAUSE)
            LOG.warning("version %d was not broadcast, the replicas take it from the store: %s", version, error)
            return "failed"
        self._failures = 0
        seconds = time.monotonic() - started
        LOG.info("weights broadcast", extra={"version": version, "seconds": seconds, "replicas": len(sessions)})
        return "sent"

    def _to_all(
        self, sessions: Mapping[str, str], version: int, state: Mapping[str, Tensor], probe: WeightProbe | None
    ) -> None:
        client, sender = self._client, self._sender
        members = {} if client is None else dict.fromkeys(client.addresses, client.session)
        if sender is None or members != sessions:
            self._leave()
            sender = self._join(sessions)
        sender.send(version, state, probe)

    def _join(self, addresses: Collection[str]) -> Sender:
        """Form a group of these replicas."""
        client = self._client = ReplicaClient(
            {address: self._stubs[address] for address in addresses},
            self._loop,
            session=uuid.uuid4().hex[:12],
            transport=self._transport,
            workers=self._workers,
            timeout_seconds=self._timeout_seconds,
        )
        sender = self._open_sender(client, own_host(client.addresses), _free_port())
        if self._client is not client:
            sender.close()
            raise DeadlineError("the replicas to join a broadcast group", self._timeout_seconds)
        self._sender = sender
        return sender

    def _sessions(self) -> dict[str, str]:
        """The broadcast group of each replica that answers."""

        async def ask() -> list[Any]:
            request = rollout_pb2.RolloutServiceGetStatusRequest()
            seconds = min(STATUS_SECONDS, self._timeout_seconds)
            asked = (call(stub.GetStatus, request, seconds, awaited=address) for address, stub in self._stubs.items())
            return await asyncio.gather(*asked, return_exceptions=True)

        try:
            answers = asyncio.run_coroutine_threadsafe(ask(), self._loop).result(2 * STATUS_SECONDS)
        except TimeoutError:
            return {}
        return {
            address: answer.transfer_session
            for address, answer in zip(self._stubs, answers, strict=True)
            if isinstance(answer, rollout_pb2.RolloutServiceGetStatusResponse)
        }

    def _leave(self) -> None:
        sender, self._sender, self._client = self._sender, None, None
        if sender is not None:
            sender.close()


def connect_broadcaster(
    environment: ServiceEnvironment, job: JobSpec, device: torch.device, count: Callable[[Outcome], object]
) -> WeightBroadcaster | None:
    """The job's broadcaster, or None if weights go only through the store. Call it on the event loop.

    Raises:
        ConfigError: ``weights.transport`` cannot work here.
    """
    transport, vllm = job.weights.transport, job.rollout.vllm
    if transport == "store":
        return None
    field = "weights.transport"
    if importlib.util.find_spec("vllm") is None:
        remedy = "Install it there with pip install 'jackpot[vllm]', or use store."
        raise ConfigError(field, transport, "the learner broadcasts with vLLM, which is not installed", remedy)
    if transport == "nccl" and device.type != "cuda":
        problem = f"the learner is on {device.type}, and NCCL goes from GPU to GPU"
        raise ConfigError(field, transport, problem, "Use store, or put the learner on a GPU.")
    if not environment.rollout_addresses:
        problem = "the learner is not told where the rollout replicas are (JACKPOT_ROLLOUT_ADDRESSES)"
        raise ConfigError(field, transport, problem, "Use store with this launcher.")

    def open_sender(client: ReplicaClient, host: str, port: int) -> Sender:
        from jackpot.learner.publishing.vllm_sender import VllmSender

        seconds = job.weights.transfer_timeout_seconds
        return VllmSender(client, transport=transport, host=host, port=port, device=device, timeout_seconds=seconds)

    tls = {"tls_dir": environment.tls_dir, "tls_peer_name": environment.tls_peer_name}
    return WeightBroadcaster(
        {address: open_channel(address, **tls) for address in environment.rollout_addresses},
        open_sender,
        transport=transport,
        workers=vllm.tensor_parallel_size * vllm.data_parallel_size,
        timeout_seconds=job.weights.transfer_timeout_seconds,
        count=count,
    )


def own_host(addresses: Sequence[str]) -> str:
    """This machine's address as seen from the servers at ``addresses``."""
    hosts = [a.rpartition(":")[0].strip("[]") for a in addresses if not a.startswith("unix:")]
    distant = [host for host in hosts if not _is_loopback(host)]
    if not distant:
        return "127.0.0.1"
    family, _, _, _, there = socket.getaddrinfo(distant[0], 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(there)  # sends nothing: the kernel looks up its route
        return str(probe.getsockname()[0])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _within(seconds: float, work: Callable[[], Result], awaited: str) -> Result:
    """Run work in a separate thread; one that does not end in time is abandoned.

    Raises:
        DeadlineError: it did not.
        BaseException: the work's own error.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # the thread's outermost frame: the waiting caller raises it
            errors.append(error)

    thread = threading.Thread(target=run, name="broadcast-weights", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise DeadlineError(awaited, seconds)
    if errors:
        raise errors[0]
    return results[0]
