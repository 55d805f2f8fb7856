"""Collects batches from the bus, in slot order and flat; the next one is collected while a batch is trained."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from jackpot.bus import Delivery, TrajectoryBus
from jackpot.config import JobSpec
from jackpot.errors import BusError, BusLostError, DeadlineError
from jackpot.scoring.batch import Batch, build_batch
from jackpot.trajectory import GroupKey, ScoredGroup

LOG = logging.getLogger(__name__)

Result = TypeVar("Result")

# Short enough for timely stop requests and lease renewals, long enough not to spin.
BLOCK_SECONDS = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Collected:
    """A complete batch: its groups in slot order, and the same as flat arrays."""

    groups: list[ScoredGroup]
    batch: Batch


class BatchCollector:
    """Takes scored groups until every slot of a batch is filled.

    Args:
        job: the job as resolved.
        bus: an open bus.
    """

    def __init__(self, job: JobSpec, bus: TrajectoryBus) -> None:
        self._job = job
        self._bus = bus
        self._size = job.learner.groups_per_batch
        self._timeout = job.learner.batch_timeout_seconds
        self._held: dict[int, Delivery[ScoredGroup]] = {}  # by slot: taken from the bus, not yet in a batch
        self._first_slot = 0  # of the batch being collected; earlier slots are in a batch already
        self._last_arrival = 0.0
        self._gathering: asyncio.Task[Collected] | None = None

    def prefetch(self, batch: int) -> None:
        """Start collecting the batch of the next :meth:`collect`, concurrently with the caller's work."""
        assert self._gathering is None
        self._first_slot = batch * self._size
        self._gathering = asyncio.create_task(self._gather(batch))

    async def collect(
        self, batch: int, stopped: Callable[[], bool], watch: Callable[[], None] = lambda: None
    ) -> Collected | None:
        """A batch, once it is complete; None if stopped while waiting.

        Args:
            batch: its number.
            stopped: whether to give up.
            watch: called repeatedly while waiting; its errors propagate.

        Raises:
            DeadlineError: nothing arrived for ``batch_timeout_seconds``, or the bus was unavailable for that long.
        """
        if self._gathering is None:
            self.prefetch(batch)
        since = time.monotonic()
        while self._gathering is not None:
            await asyncio.wait((self._gathering,), timeout=BLOCK_SECONDS)
            watch()
            if self._gathering.done():
                collected = self._gathering.result()
                self._gathering = None
                if self._still_held(collected):
                    return self._used(batch, collected)
                self.prefetch(batch)  # the server lost the groups held: they are generated again
            elif stopped():
                await self.close()
            else:
                self._check_deadline(batch, since)
        return None

    async def close(self) -> None:
        """Stop gathering."""
        if self._gathering is not None:
            self._gathering.cancel()
            with suppress(asyncio.CancelledError):
                await self._gathering
            self._gathering = None

    async def with_bus(self, call: Callable[[], Awaitable[Result]]) -> Result:
        """Repeat a call until the server is back; all calls of the bus are safe to repeat.

        Raises:
            DeadlineError: it was unavailable for ``batch_timeout_seconds``.
        """
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return await call()
            except BusLostError:
                # The orchestrator regenerates the held groups; trained ones are in the manifests.
                self._held.clear()
                await self._bus.open()
            except BusError as error:
                if time.monotonic() > deadline:
                    raise DeadlineError("the bus", self._timeout, f"The last error was: {error}") from error
                LOG.warning("the bus is not available: %s", error)
                await asyncio.sleep(BLOCK_SECONDS)

    async def _gather(self, batch: int) -> Collected:
        slots = self._slots(batch)
        while missing := sum(slot not in self._held for slot in slots):
            for delivery in await self.with_bus(partial(self._bus.take_scored, self._size, BLOCK_SECONDS, missing)):
                self._last_arrival = time.monotonic()
                await self._hold(delivery)
        groups = [self._held[slot].value for slot in slots]
        advantage, longest = self._job.algorithm.advantage, self._job.learner.max_sequence_tokens
        return Collected(groups, await asyncio.to_thread(build_batch, groups, advantage, longest))

    async def _hold(self, delivery: Delivery[ScoredGroup]) -> None:
        slot = GroupKey.parse(delivery.group_id).slot
        if slot < self._first_slot:
            return  # delivered again after a restart; its batch has just been trained from the manifest
        if slot in self._held and self._held[slot].group_id != delivery.group_id:
            detail = "its slot was already filled"
            await self.with_bus(partial(self._bus.drop, delivery.group_id, "unused", detail))
        else:
            self._held[slot] = delivery

    def _used(self, batch: int, collected: Collected) -> Collected:
        for slot in self._slots(batch):
            del self._held[slot]  # the bus holds it until the commit
        self._first_slot = (batch + 1) * self._size
        return collected

    def _still_held(self, collected: Collected) -> bool:
        held = {id(delivery.value) for delivery in self._held.values()}
        return all(id(group) in held for group in collected.groups)

    def _slots(self, batch: int) -> Sequence[int]:
        return range(batch * self._size, (batch + 1) * self._size)

    def _check_deadline(self, batch: int, since: float) -> None:
        """Counts from the start of the learner's wait, not from the start of collecting: a step may take long."""
        if time.monotonic() - max(since, self._last_arrival) > self._timeout:
            have = sum(slot in self._held for slot in self._slots(batch))
            raise DeadlineError(
                f"batch {batch} ({have} of {self._size} groups are here)",
                self._timeout,
                "Look at the scorer's and the orchestrator's logs, or raise learner.batch_timeout_seconds.",
            )
