"""Presents rollout replicas as one: requests go to the least loaded, and a failing one is skipped until it is ready."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import grpc

from jackpot.errors import (
    DeadlineError,
    EngineError,
    PayloadError,
    QueueFullError,
    RequestRefusedError,
    WeightError,
)
from jackpot.rpc.address import READINESS
from jackpot.rpc.channel import call, wait_ready
from jackpot.rpc.proto import trajectory_from_proto
from jackpot.trajectory import Trajectory
from jackpot.v1 import rollout_pb2, rollout_pb2_grpc, weights_pb2

LOG = logging.getLogger(__name__)

READY_LOG_SECONDS = 30.0  # how often an unreachable replica is logged


class _Replica:
    """One server and its state in the pool."""

    def __init__(self, address: str, channel: grpc.aio.Channel) -> None:
        self.address = address
        self.channel = channel
        self.stub = rollout_pb2_grpc.RolloutServiceStub(channel)  # type: ignore[no-untyped-call]
        self.in_flight = 0
        self.up = False
        self.full_until = 0.0  # monotonic clock
        self.suspected = asyncio.Event()
        self.suspected.set()

    def suspect(self) -> None:
        """Skip the replica until its health check reports that it is ready."""
        self.up = False
        self.suspected.set()

    @contextmanager
    def busy(self) -> Iterator[None]:
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1


class ReplicaPool:
    """Distributes Generate calls over several replicas. Run :meth:`watch` concurrently with the other methods.

    Args:
        connect: opens a channel to an address.
        addresses: the first replicas.
        attempts: how often one group is tried, each time on another replica if there is one.
        timeout_seconds: deadline of one call, and of waiting for a replica.
    """

    def __init__(
        self,
        connect: Callable[[str], grpc.aio.Channel],
        addresses: Collection[str],
        attempts: int,
        timeout_seconds: float,
    ) -> None:
        self._connect = connect
        self._attempts = attempts
        self._timeout_seconds = timeout_seconds
        self._changed = asyncio.Condition()
        self._replicas: list[_Replica] = []
        self._leaving: set[_Replica] = set()
        self._membership_changed = asyncio.Event()
        self.num_wanted = len(addresses)
        """How many replicas there should be."""
        self.use(addresses, len(addresses))

    def use(self, addresses: Collection[str], wanted: int) -> None:
        """Use these replicas from now on. Running calls on other replicas finish, and then their channels close.

        Args:
            addresses: replicas that can be reached, or soon will be.
            wanted: how many replicas there should be.

        Raises:
            ConfigError: an address is invalid, or the TLS files cannot be read.
        """
        self.num_wanted = wanted
        known = {replica.address: replica for replica in self._replicas}
        if known.keys() == set(addresses):
            return
        self._leaving |= {replica for replica in self._replicas if replica.address not in addresses}
        self._replicas = [
            known.get(address) or _Replica(address, self._connect(address)) for address in dict.fromkeys(addresses)
        ]
        self._membership_changed.set()

    @property
    def num_ready(self) -> int:
        """How many replicas can be used now: reported ready and not found disconnected since."""
        away = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)
        return sum(replica.up and replica.channel.get_state() not in away for replica in self._replicas)

    async def watch(self) -> None:
        """Keep checking which replicas are ready, and close those that have left. Never returns."""
        watching: dict[_Replica, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._membership_changed.clear()
                for replica in self._replicas:
                    if replica not in watching:
                        watching[replica] = tasks.create_task(self._watch(replica))
                for replica in [replica for replica in watching if replica in self._leaving]:
                    task = watching.pop(replica)
                    task.cancel()
                    await asyncio.wait([task])
                for replica in [replica for replica in self._leaving if not replica.in_flight]:
                    self._leaving.discard(replica)
                    await replica.channel.close()
                await self._membership_changed.wait()

    async def close(self) -> None:
        """Close every channel; running calls fail."""
        for replica in (*self._replicas, *self._leaving):
            await replica.channel.close()

    async def generate(self, request: rollout_pb2.GenerateRequest) -> tuple[Trajectory, ...]:
        """Sample one group.

        A full replica is tried again later and costs no attempt.

        Raises:
            RequestRefusedError: the request can never work.
            EngineError: every attempt failed; the message names each failure.
            DeadlineError: no replica became ready in time.
        """
        failures: list[str] = []
        failed: set[str] = set()
        while len(failures) < self._attempts:
            replica = await self._pick(failed)
            if replica is None:
                failures.append(f"every replica's queue stayed full for {self._timeout_seconds:g} s")
                continue
            try:
                return await self._generate_on(replica, request)
            except QueueFullError as error:
                replica.full_until = time.monotonic() + error.retry_after_seconds
            except RequestRefusedError:
                raise
            except (EngineError, DeadlineError, WeightError, PayloadError) as error:
                if replica in self._leaving:
                    continue  # the replica was asked to stop: the group did not fail
                LOG.warning("attempt %d of %s failed: %s", len(failures) + 1, request.group_id, error)
                failures.append(str(error))
                failed.add(replica.address)
                replica.suspect()
        raise EngineError(f"{len(failures)} attempts failed: {'; '.join(failures)}")

    async def load_weights(self, min_version: int) -> int:
        """Wait until every replica holds at least ``min_version``; returns the oldest version held.

        Raises:
            JackpotError: a replica did not reach it in time.
        """
        weights = weights_pb2.LoadWeightsRequest(min_version=min_version)
        request = rollout_pb2.RolloutServiceLoadWeightsRequest(weights=weights)
        versions = []
        for replica in self._replicas:
            await wait_ready(replica.channel, READINESS, self._timeout_seconds)
            awaited = f"LoadWeights on {replica.address}"
            response = await call(replica.stub.LoadWeights, request, self._timeout_seconds, awaited=awaited)
            versions.append(int(response.weights.version))
        return min(versions)

    async def _generate_on(self, replica: _Replica, request: rollout_pb2.GenerateRequest) -> tuple[Trajectory, ...]:
        awaited = f"Generate on {replica.address}"
        try:
            with replica.busy():
                response = await call(replica.stub.Generate, request, self._timeout_seconds, awaited=awaited)
        finally:
            if replica in self._leaving and not replica.in_flight:
                self._membership_changed.set()  # nothing needs its channel any more
        trajectories = tuple(trajectory_from_proto(message) for message in response.trajectories)
        if len(trajectories) != request.num_trajectories:
            raise PayloadError(f"{awaited}: {len(trajectories)} trajectories where {request.num_trajectories} were due")
        oldest = min(trajectory.oldest_version for trajectory in trajectories)
        if oldest < request.min_version:
            raise PayloadError(f"{awaited}: sampled by version {oldest}, older than {request.min_version}")
        return trajectories

    async def _pick(self, failed: Collection[str]) -> _Replica | None:
        """The best replica; None if all ready ones stay full.

        Raises:
            DeadlineError: no replica became ready in time.
        """
        deadline = time.monotonic() + self._timeout_seconds
        while (now := time.monotonic()) < deadline:
            ready = [replica for replica in self._replicas if self._is_ready(replica)]
            free = [replica for replica in ready if replica.full_until <= now]
            if free:
                # Prefer a replica that has not failed this group, then the least loaded one.
                return min(free, key=lambda replica: (replica.address in failed, replica.in_flight))
            until = min([replica.full_until for replica in ready] + [deadline])
            await self._wait_for_change(until - now)
        if any(replica.up for replica in self._replicas):
            return None
        addresses = ", ".join(replica.address for replica in self._replicas) or "none is known"
        raise DeadlineError(f"a rollout replica to be ready ({addresses})", self._timeout_seconds, "See their logs.")

    def _is_ready(self, replica: _Replica) -> bool:
        if replica.up and replica.channel.get_state() is not grpc.ChannelConnectivity.READY:
            replica.suspect()
        return replica.up

    async def _wait_for_change(self, timeout_seconds: float) -> None:
        try:
            async with asyncio.timeout(timeout_seconds), self._changed:
                await self._changed.wait()
        except TimeoutError:
            return  # the passing of time is the change: a full replica may be tried again

    async def _watch(self, replica: _Replica) -> None:
        while True:
            await replica.suspected.wait()
            try:
                await wait_ready(replica.channel, READINESS, READY_LOG_SECONDS)
            except DeadlineError as error:
                LOG.warning("a rollout replica is not ready: %s", error)
                continue
            replica.suspected.clear()
            replica.up = True
            async with self._changed:
                self._changed.notify_all()
