"""The trajectory bus carries groups from the orchestrator through the scorers to the learner. Delivery is at least
once, and every effect happens exactly once.

A group is *dispatched* (registered, its bytes reserved), *published*, *scored*, and ends in one terminal state:
``trained`` or ``dropped:<reason>``. A group that the learner will score skips the scorers and is *scored* at once.
Streams carry claims of about 100 bytes; a payload store holds the arrays. Nothing unread is ever trimmed: dispatch
waits while the byte budget is exhausted. Entries are acknowledged after their effect.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import cast

from jackpot.bus.client import BusClient
from jackpot.bus.coalesce import all_ended
from jackpot.bus.lease_renewal import leases_renewed
from jackpot.bus.ledger import Delivery, PublishOutcome, Value
from jackpot.bus.object_payloads import ObjectPayloads
from jackpot.bus.payload_format import decode_group, decode_scored, encode_group, encode_scored
from jackpot.bus.payloads import FilePayloads, PayloadStore, RedisPayloads
from jackpot.bus.published_payloads import PublishedPayloads
from jackpot.bus.reader import Entry, StreamReader
from jackpot.bus.readings import BusReadings
from jackpot.config import BusConfig
from jackpot.errors import BusError, ConfigError, LeaseLostError, PayloadError, PayloadMissingError
from jackpot.storage.objects import Objects
from jackpot.trajectory import Group, GroupKey, ScoredGroup

LOG = logging.getLogger(__name__)

_GROUPS_PER_SCRIPT = 64  # a running script blocks the server
_DETAIL_CHARACTERS = 500


class TrajectoryBus:
    """One process's access to one job's bus. Create it with :meth:`connect`, then call :meth:`open`.

    Every method raises BusError if the server cannot be reached or refuses, and BusLostError if it lost the job's
    state. After a BusLostError, :meth:`open` starts again with empty state.
    """

    def __init__(self, client: BusClient, store: PayloadStore, settings: BusConfig, job_id: str, consumer: str) -> None:
        self._client = client
        self.readings = BusReadings(client, settings.max_bytes)
        """Queries that change nothing."""
        self._store = store
        self._payloads = PublishedPayloads(client, store, settings.max_payload_bytes)
        self._settings = settings
        self._job_id = job_id
        lease = settings.lease_seconds
        self._rollouts = StreamReader(client, client.keys.rollouts, "scorers", consumer, lease, counts_attempts=True)
        self._scored = StreamReader(client, client.keys.scored, "learner", consumer, lease, counts_attempts=False)

    # --- life cycle ---

    @classmethod
    async def connect(
        cls, url: str, job_id: str, settings: BusConfig, consumer: str, payloads: Path | Objects
    ) -> TrajectoryBus:
        """Connect to the server.

        Args:
            url: ``redis://``, ``rediss://`` or ``unix://``.
            job_id: the job.
            settings: the job's ``bus`` section.
            consumer: this process's name among the consumers; it must be the same after a restart.
            payloads: place of the ``file`` or ``s3`` payload store (:func:`jackpot.storage.job_storage.payload_place`).

        Raises:
            BusError: the server does not answer.
            ConfigError: the server is too old, or evicts keys when it is full.
        """
        client = BusClient(url, job_id)
        store: PayloadStore
        if isinstance(payloads, Objects):
            store = ObjectPayloads(payloads, settings.max_payload_bytes)
        elif settings.payload_store == "file":
            store = FilePayloads(payloads, settings.max_payload_bytes)
        else:
            store = RedisPayloads(client, settings.max_payload_bytes)
        try:
            await client.check_server()
        except (BusError, ConfigError):
            await client.close()
            raise
        return cls(client, store, settings, job_id, consumer)

    async def close(self) -> None:
        """Close the connections. This consumer keeps its entries until their leases expire."""
        await self._client.close()

    async def open(self) -> bool:
        """Create the job's streams and consumer groups, or join existing ones; safe to repeat.

        Returns:
            Whether this call created the state. After a BusLostError this tells which process came first.
        """
        proposed = secrets.token_hex(8)
        incarnation = await self._client.run_unfenced("open", [proposed])
        if self._client.incarnation and incarnation != self._client.incarnation:
            LOG.warning("the bus of job %s lost its state and was created again", self._job_id)
            self._rollouts.restart()
            self._scored.restart()
        self._client.incarnation = incarnation
        await self._sweep(self._lost if incarnation == proposed else self._ended)
        return bool(incarnation == proposed)

    async def join(self) -> None:
        """Join a bus that another process has opened. Creates, takes and sweeps nothing; for :meth:`fetch_scored`.

        Raises:
            BusError: no process has opened it.
        """
        await self._client.join()

    # --- orchestrator ---

    async def reserve(self, group_id: str, num_bytes: int, *, urgent: bool = False) -> bool:
        """Register a group as dispatched and reserve its bytes. Its real size replaces them when it is published.

        Args:
            group_id: the group.
            num_bytes: upper estimate of the group's payload.
            urgent: ignore the budget. For a group that the learner is waiting for: if it were held back, the groups
                that fill the budget could never leave the bus.

        Returns:
            False if the budget is exhausted: wait and try again. True also if the group is already reserved.

        Raises:
            BusError: the group has already ended.
            ConfigError: the group alone exceeds the budget.
        """
        self._check_id(group_id)
        budget = self._settings.max_bytes
        if num_bytes > budget and not urgent:
            raise ConfigError(
                "bus.max_bytes", budget, f"one group may take {num_bytes} bytes", "Raise it, or shorten the groups."
            )
        outcome = await self._client.run("reserve", [group_id, num_bytes, budget, int(urgent)])
        if outcome not in ("reserved", "full"):
            raise BusError(f"group {group_id} cannot be dispatched: it has ended already ({outcome})")
        return bool(outcome == "reserved")

    async def publish(self, group: Group) -> PublishOutcome:
        """Put a group on the bus for scoring; safe to repeat.

        A group that the bus does not know, because the server lost its last second of writes, is registered here.

        Returns:
            ``duplicate`` if the group is already on the bus, ``terminal`` if it has ended; neither changes anything.

        Raises:
            PayloadError: the group breaks a rule of its format or is larger than ``bus.max_payload_bytes``.
        """
        self._check_id(group.group_id)
        outcome = await self._payloads.publish("publish", "rollout", group, encode_group, ["published"])
        return cast("PublishOutcome", outcome)

    async def publish_deferred(self, scored: ScoredGroup) -> PublishOutcome:
        """Put a group on the bus for the learner, which will score it; no scorer receives it. Else as :meth:`publish`.

        Args:
            scored: the group in the form of a scored group (:func:`jackpot.trajectory.deferred`).
        """
        self._check_id(scored.group_id)
        outcome = await self._payloads.publish("publish", "scored", scored, encode_scored, ["scored"])
        return cast("PublishOutcome", outcome)

    # --- scorer ---

    async def take_groups(self, max_groups: int, block_seconds: float) -> list[Delivery[Group]]:
        """Take groups to score: first those that this consumer held before a restart, then those whose leases expired,
        then new ones.

        A group that was tried before comes alone, once every held group has been published, failed, released or
        dropped. Unreadable groups and those without attempts left end here and are not returned.

        Returns:
            At most ``max_groups``; empty if none came within ``block_seconds``.
        """
        return await self._take(self._rollouts, decode_group, max_groups, block_seconds)

    async def publish_scored(self, delivery: Delivery[Group], scored: ScoredGroup) -> None:
        """Replace a group with its scored form and acknowledge it.

        Raises:
            LeaseLostError: another consumer took the group over, or it has ended; discard the result.
            PayloadError: the scores break a rule of their format or are larger than ``bus.max_payload_bytes``.
        """
        group_id = delivery.group_id
        if scored.group_id != group_id:
            raise ValueError(f"scores of {scored.group_id} for the delivery of {group_id}")
        outcome = await self._payloads.publish("scored", "scored", scored, encode_scored, [delivery.entry_id])
        self._rollouts.release(group_id)
        if outcome == "lost":
            raise LeaseLostError(f"group {group_id} was taken over or has ended; its scores are thrown away")
        await self._store.delete(delivery.payload)

    async def fail(self, delivery: Delivery[Group], reason: str, detail: str = "") -> None:
        """Return a group for another attempt, or end it as ``dropped:<reason>`` if this was the last one."""
        outcome = await self._give_back(delivery, attempts=delivery.attempt)
        if outcome == "exhausted":
            await self._finish("dropped", reason, detail, [(delivery.group_id, -1, delivery.entry_id)])

    async def release(self, deliveries: Sequence[Delivery[Group]]) -> None:
        """Return groups untried, as when stopping: the attempt does not count."""
        for delivery in deliveries:
            await self._give_back(delivery, attempts=delivery.attempt - 1)

    # --- learner ---

    async def take_scored(
        self, max_groups: int, block_seconds: float, enough: int | None = None
    ) -> list[Delivery[ScoredGroup]]:
        """Take scored groups. This consumer keeps them until :meth:`commit_trained` or :meth:`drop`.

        This object returns each group once, across reconnections and server restarts. A new process first receives what
        the old one had not committed. Unreadable groups end here and are not returned.

        Args:
            max_groups: the most groups to return.
            block_seconds: how long to wait for the first group.
            enough: return at once with this many, without waiting for more; None is ``max_groups``.

        Returns:
            At most ``max_groups``; empty if none came within ``block_seconds``.
        """
        return await self._take(self._scored, decode_scored, max_groups, block_seconds, enough)

    async def fetch_scored(self, group_ids: Sequence[str]) -> dict[str, ScoredGroup]:
        """Read scored groups again, to repeat a batch. Ended, unscored, missing and unreadable groups are left out."""
        if not group_ids:
            return {}
        keys = self._client.keys
        states, names = await self._client.read(("HMGET", keys.open, *group_ids), ("HMGET", keys.payloads, *group_ids))
        scored_by_id = {}
        for group_id, state, name in zip(group_ids, states, names, strict=True):
            if state == "scored":
                try:
                    scored_by_id[group_id] = await self._payloads.load(group_id, name, decode_scored)
                except PayloadError as error:
                    LOG.warning("scored group %s cannot be read: %s", group_id, error)
        return scored_by_id

    async def commit_trained(self, step_by_group: Mapping[str, int]) -> list[str]:
        """End groups as ``trained`` at their optimizer steps and acknowledge them; safe to repeat.

        Returns:
            Groups that had already ended otherwise and stay so: normally none.
        """
        ends = await self._finish("trained", "", "", [(group_id, step, "") for group_id, step in step_by_group.items()])
        conflicts = [group_id for group_id, ended in ends.items() if ended.startswith("dropped")]
        if conflicts:
            LOG.error("trained, but dropped before: %s", ", ".join(conflicts))
        return conflicts

    # --- everyone ---

    async def renew(self) -> list[str]:
        """Renew the leases of all unfinished groups that were taken; returns the ids of those already lost."""
        return [*await self._rollouts.renew(), *await self._scored.renew()]

    def leases_renewed(self) -> AbstractAsyncContextManager[None]:
        """Renew the leases of all taken groups while the ``async with`` block runs; lost leases are logged."""
        return leases_renewed(self.renew, self._settings.lease_seconds)

    async def drop(self, group_id: str, reason: str, detail: str = "") -> None:
        """End a group as ``dropped:<reason>``; no-op if it has already ended.

        A group that the bus does not know is counted as dispatched and dropped, so that the counters still add up.
        """
        self._check_id(group_id)
        await self._finish("dropped", reason, detail, [(group_id, -1, "")])

    async def close_job(self, detail: str = "the job is over") -> int:
        """Drop every open group as ``unused`` and remove payloads that crashed processes left behind.

        Returns:
            How many groups were dropped.
        """
        dropped = 0
        while still_open := list(await self.readings.dispatched()):
            ends = await self._finish("dropped", "unused", detail, [(group_id, -1, "") for group_id in still_open])
            dropped += sum(not ended for ended in ends.values())
        await self._sweep(self._lost)
        return dropped

    async def set_value(self, name: str, value: str) -> None:
        """Store a small value for the job."""
        await self._client.run("set_value", [name, value])

    # --- the parts ---

    def _check_id(self, group_id: str) -> None:
        """Ids become keys and file names.

        Raises:
            BusError: the id is not one of this job's groups.
        """
        try:
            GroupKey.parse(group_id)
        except ValueError as error:
            raise BusError(str(error)) from None
        if not group_id.startswith(f"{self._job_id}.s"):
            raise BusError(f"group {group_id} does not belong to job {self._job_id}")

    async def _take(
        self,
        reader: StreamReader,
        decode: Callable[..., Value],
        max_groups: int,
        block_seconds: float,
        enough: int | None = None,
    ) -> list[Delivery[Value]]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + block_seconds
        while True:
            block = max(0.0, deadline - loop.time())
            entries = await reader.next(max_groups, block, max_groups if enough is None else enough)
            try:
                # Concurrently, so that their payloads are read in one exchange.
                read = await all_ended(self._deliver(entry, reader, decode) for entry in entries)
            except BaseException:
                reader.put_back(entries)  # interrupted: the caller has seen none of them
                raise
            deliveries = [delivery for delivery in read if delivery is not None]
            if deliveries or loop.time() >= deadline:
                return deliveries

    async def _deliver(
        self, entry: Entry, reader: StreamReader, decode: Callable[..., Value]
    ) -> Delivery[Value] | None:
        """Read the payload of a claim; None if the group had to be dropped."""
        reason, detail = "", ""
        if reader is self._rollouts and entry.attempt > self._settings.max_attempts:
            reason, detail = "scoring_failed", f"taken {entry.attempt - 1} times and never finished"
        else:
            try:
                value = await self._payloads.load(entry.group_id, entry.payload, decode)
                return Delivery(
                    group_id=entry.group_id,
                    value=value,
                    attempt=entry.attempt,
                    entry_id=entry.entry_id,
                    payload=entry.payload,
                )
            except PayloadMissingError as error:
                reason, detail = "lost", str(error)
            except PayloadError as error:
                reason, detail = "corrupt_payload", str(error)
        # Another consumer may have finished the group meanwhile and removed its payload: drop only the claim that was
        # read.
        await self._finish("dropped", reason, detail, [(entry.group_id, -1, entry.entry_id)])
        return None

    async def _give_back(self, delivery: Delivery[Group], attempts: int) -> str:
        args = [delivery.group_id, delivery.entry_id, delivery.attempt, attempts, self._settings.max_attempts]
        outcome: str = await self._client.run("release", args)
        self._rollouts.release(delivery.group_id)
        return outcome

    async def _finish(
        self, state: str, reason: str, detail: str, ends: Sequence[tuple[str, int, str]]
    ) -> dict[str, str]:
        """Give groups their terminal state.

        Args:
            state: ``trained`` or ``dropped``.
            reason: why dropped.
            detail: for humans.
            ends: group, step, and the entry that must still be the group's claim (empty: any claim).

        Returns:
            By group: empty if this call ended it, its earlier end, or ``lost`` if another claim has replaced the entry.
        """
        answers: dict[str, str] = {}
        for start in range(0, len(ends), _GROUPS_PER_SCRIPT):
            part = ends[start : start + _GROUPS_PER_SCRIPT]
            args = [state, reason, detail[:_DETAIL_CHARACTERS], *(value for end in part for value in end)]
            payload_keys = [self._client.keys.payload(group_id) for group_id, *_ in part]
            results = await self._client.run("finish", args, payload_keys)
            for (group_id, *_), (answer, payload) in zip(part, results, strict=True):
                answers[group_id] = answer
                self._rollouts.release(group_id)
                self._scored.release(group_id)
                if payload:
                    await self._store.delete(payload)
                if not answer and state == "dropped":
                    LOG.info("group %s dropped: %s %s", group_id, reason, detail)
        return answers

    async def _sweep(self, left_behind: Callable[[Sequence[str]], Awaitable[set[str]]]) -> None:
        """Remove payloads of processes that crashed halfway: no call will ever remove them."""
        if removed := await self._store.sweep(left_behind):
            LOG.info("removed %d payloads that crashed processes had left behind", removed)

    async def _ended(self, group_ids: Sequence[str]) -> set[str]:
        return set(await self.readings.terminal_states(group_ids))

    async def _lost(self, group_ids: Sequence[str]) -> set[str]:
        """Those of this job's groups that the bus does not know, or that have ended."""
        return {group_id for group_id in group_ids if group_id.startswith(f"{self._job_id}.s")} - set(
            await self.readings.dispatched()
        )
