"""The scorer's bus worker: it takes groups, scores them and publishes the scores, exactly once in effect."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from jackpot.bus import Delivery, TrajectoryBus
from jackpot.bus.coalesce import all_ended
from jackpot.compute.ranks.group import RankLostError
from jackpot.config import JobSpec
from jackpot.errors import (
    BusError,
    BusLostError,
    DeadlineError,
    JackpotError,
    LeaseLostError,
    PayloadError,
    WeightMissingError,
)
from jackpot.scorer.engine import ScoringEngine
from jackpot.trajectory import Group, ScoredGroup

LOG = logging.getLogger(__name__)

# Short enough to stop promptly, long enough not to spin.
BLOCK_SECONDS = 0.5
FIRST_PAUSE_SECONDS = 0.1
GREATEST_PAUSE_SECONDS = 5.0

# What scoring may raise for one group: our refusals, and torch's errors for arrays that it cannot use (out of memory
# is a RuntimeError).
SCORING_ERRORS = (JackpotError, RuntimeError, ValueError, IndexError)


@dataclass(slots=True, eq=False)
class _Waiting:
    """A group that has been taken but not scored."""

    delivery: Delivery[Group]
    since: float  # monotonic


class ScorerWorker:
    """Scores groups from the bus, each batch with its version of the policy, while fetching the next groups.

    A group whose version has not been published waits here with its lease renewed, and blocks no other. Pacing bounds
    their number: a batch is dispatched at most ``max_staleness`` steps before it trains.

    Args:
        job: the job as resolved.
        bus: an open bus.
        engine: the models.
        stop: once set, the worker finishes the running batch and returns the other groups to the bus.
    """

    def __init__(self, job: JobSpec, bus: TrajectoryBus, engine: ScoringEngine, stop: asyncio.Event) -> None:
        self._job = job
        self._bus = bus
        self._engine = engine
        self._stop = stop
        self._waiting: list[_Waiting] = []

    async def run(self) -> None:
        """Work until stopped."""
        fetching = asyncio.create_task(self._fetch())
        try:
            async with self._bus.leases_renewed():
                while not self._stop.is_set():
                    await self._wait_for_work(fetching)
                    if fetching.done():
                        self._waiting += [_Waiting(delivery, time.monotonic()) for delivery in fetching.result()]
                        fetching = asyncio.create_task(self._fetch())
                    if self._waiting:
                        await self._score_what_can_be()
                await self._wait_for_work(fetching)
                fetched = fetching.result() if fetching.done() else []
                await self._give_back([*(waiting.delivery for waiting in self._waiting), *fetched])
        finally:
            fetching.cancel()
            await asyncio.gather(fetching, return_exceptions=True)

    async def _wait_for_work(self, fetching: asyncio.Task[list[Delivery[Group]]]) -> None:
        """Wait until groups are fetched, a stop is requested, or it is time to look for awaited weights."""
        stopping = asyncio.create_task(self._stop.wait())
        look_again = self._job.scorer.weight_poll_seconds if self._waiting else None
        try:
            with self._engine.activity.doing("wait_weights" if self._waiting else "wait_groups"):
                await asyncio.wait((fetching, stopping), timeout=look_again, return_when=asyncio.FIRST_COMPLETED)
                if self._stop.is_set():
                    await asyncio.wait((fetching,), timeout=4 * BLOCK_SECONDS)
        finally:
            stopping.cancel()

    async def _fetch(self) -> list[Delivery[Group]]:
        """The next groups; empty only when stopped."""
        deliveries: list[Delivery[Group]] = []

        async def take() -> None:
            nonlocal deliveries
            deliveries = await self._bus.take_groups(self._job.scorer.max_groups_per_batch, BLOCK_SECONDS)

        while not deliveries and not self._stop.is_set():
            await self._on_bus("taking groups", take)
        return deliveries

    async def _score_what_can_be(self) -> None:
        """Score the groups whose policy version is available, each batch with its version; the others keep waiting."""
        await self._engine.refresh_soon()
        ready: dict[int, list[Delivery[Group]]] = {}
        early = []
        for waiting in self._waiting:
            version = self._job.reference_version(waiting.delivery.value.slot)
            if self._engine.serves(version):
                ready.setdefault(version, []).append(waiting.delivery)
            else:
                early.append(waiting)
        self._waiting = early
        for version, deliveries in sorted(ready.items()):
            await self._settle(deliveries, version)
        self._waiting = [waiting for waiting in self._waiting if not await self._is_given_up(waiting)]

    async def _is_given_up(self, waiting: _Waiting) -> bool:
        """Whether a group has waited too long for a version that existed at its dispatch: the attempt has then failed.
        A version that training has not made yet may take as long as training does."""
        timeout = self._job.scorer.version_timeout_seconds
        if time.monotonic() - waiting.since < timeout:
            return False
        group, newest = waiting.delivery.value, self._engine.version
        version = self._job.reference_version(group.slot)
        held = "none is there" if newest is None else f"version {newest} is the newest"
        if version > group.dispatch_version:
            LOG.warning(
                "group %s has waited %g s for version %d of the policy, which training makes (%s)",
                group.group_id,
                timeout,
                version,
                held,
            )
            waiting.since = time.monotonic()
            return False
        what = f"version {version} of the policy's weights ({held})"
        error = DeadlineError(what, timeout, "Look at the learner's log and for refused weights in the scorer's.")
        LOG.error("%s", error)
        await self._fail(waiting.delivery, error)
        return True

    async def _settle(self, deliveries: Sequence[Delivery[Group]], version: int) -> None:
        """Bring every delivery to its next state: scored, dropped, or returned for another attempt."""
        fresh = [delivery for delivery in deliveries if not await self._drop_if_stale(delivery)]
        # Concurrently, so that they reach the bus in one exchange.
        await all_ended([self._publish(*pair) for pair in await self._score(fresh, version)])

    async def _score(
        self, deliveries: Sequence[Delivery[Group]], version: int
    ) -> list[tuple[Delivery[Group], ScoredGroup]]:
        """The scores of all groups that can be scored. If the batch fails, each group is tried alone."""
        if not deliveries:
            return []
        try:
            scored = await self._engine.score([delivery.value for delivery in deliveries], version)
            return list(zip(deliveries, scored, strict=True))
        except RankLostError:
            raise  # nothing can be scored any more: the launcher restarts all ranks
        except SCORING_ERRORS as error:
            if len(deliveries) == 1:
                await self._refuse(deliveries[0], error)
                return []
            LOG.warning("a batch of %d groups failed, each is tried alone: %s", len(deliveries), error)
        return [pair for delivery in deliveries for pair in await self._score([delivery], version)]

    async def _refuse(self, delivery: Delivery[Group], error: Exception) -> None:
        if isinstance(error, WeightMissingError):
            LOG.warning("group %s is dropped: %s", delivery.group_id, error)
            await self._drop(delivery, str(error))
        else:
            LOG.error("group %s cannot be scored", delivery.group_id, exc_info=error)
            await self._fail(delivery, error)

    async def _drop_if_stale(self, delivery: Delivery[Group]) -> bool:
        start = self._job.start_step(delivery.value.slot)
        staleness, most = start - delivery.value.oldest_version, self._job.orchestrator.max_staleness
        if staleness <= most:
            return False
        await self._drop(delivery, f"{staleness} versions old where step {start} trains on it, {most} are allowed")
        return True

    async def _publish(self, delivery: Delivery[Group], scored: ScoredGroup) -> None:
        async def publish() -> None:
            try:
                await self._bus.publish_scored(delivery, scored)
            except LeaseLostError as error:
                LOG.warning("%s", error)
            except PayloadError as error:
                LOG.error("scores of group %s cannot be published: %s", delivery.group_id, error)
                await self._bus.fail(delivery, "scoring_failed", str(error))

        await self._on_bus(f"publishing scores of {delivery.group_id}", publish)

    async def _drop(self, delivery: Delivery[Group], detail: str) -> None:
        await self._on_bus(f"dropping {delivery.group_id}", lambda: self._bus.drop(delivery.group_id, "stale", detail))

    async def _fail(self, delivery: Delivery[Group], error: Exception) -> None:
        detail = f"{type(error).__name__}: {error}"
        await self._on_bus(
            f"giving {delivery.group_id} back", lambda: self._bus.fail(delivery, "scoring_failed", detail)
        )

    async def _give_back(self, deliveries: Sequence[Delivery[Group]]) -> None:
        await self._on_bus("giving groups back", lambda: self._bus.release(deliveries))

    async def _on_bus(self, what: str, act: Callable[[], Awaitable[None]]) -> None:
        """Repeat a bus operation until the server answers; give up only when stopped.

        If the server lost the job's state, there is nothing left to operate on: the bus is opened again.
        """
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return await act()
            except BusLostError as error:
                LOG.error("%s failed: %s", what, error)
                if await self._begin_bus_anew():
                    return
            except BusError as error:
                LOG.warning("%s failed, next try in %g s: %s", what, pause, error)
            if self._stop.is_set():
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._stop.wait()
            pause = min(2 * pause, GREATEST_PAUSE_SECONDS)

    async def _begin_bus_anew(self) -> bool:
        try:
            await self._bus.open()
        except BusError as error:
            LOG.warning("the bus cannot be opened: %s", error)
            return False
        return True
