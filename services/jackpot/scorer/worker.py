"""The scorer's worker on the trajectory bus: take groups, score them, publish the scores, once in effect."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

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

# Short enough that a stop request is never late, long enough not to spin.
BLOCK_SECONDS = 0.5
FIRST_PAUSE_SECONDS = 0.1
GREATEST_PAUSE_SECONDS = 5.0

# What scoring may raise for one group: our own refusals, and what torch makes of arrays that it cannot compute with
# (out of memory is a RuntimeError).
SCORING_ERRORS = (JackpotError, RuntimeError, ValueError, IndexError)


class ScorerWorker:
    """Scores what the bus delivers, while the next groups are being fetched.

    Args:
        job: the job as resolved.
        bus: an open bus.
        engine: the models.
        stop: once set, the batch under way is finished and what was fetched beyond it is given back.
    """

    def __init__(self, job: JobSpec, bus: TrajectoryBus, engine: ScoringEngine, stop: asyncio.Event) -> None:
        self._job = job
        self._bus = bus
        self._engine = engine
        self._stop = stop

    async def run(self) -> None:
        """Work until stopped."""
        fetching = asyncio.create_task(self._fetch())
        try:
            async with self._bus.leases_renewed():
                while deliveries := await self._fetched(fetching):
                    fetching = asyncio.create_task(self._fetch())
                    await self._process(deliveries)
                    if self._stop.is_set():
                        await self._give_back(await self._fetched(fetching))
                        break
        finally:
            fetching.cancel()
            await asyncio.gather(fetching, return_exceptions=True)

    async def _fetched(self, fetching: asyncio.Task[list[Delivery[Group]]]) -> list[Delivery[Group]]:
        """What a fetch brings; nothing if the bus keeps it waiting while a stop is asked for."""
        stopping = asyncio.create_task(self._stop.wait())
        try:
            with self._engine.activity.doing("wait_groups"):
                await asyncio.wait((fetching, stopping), return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait((fetching,), timeout=4 * BLOCK_SECONDS)
        finally:
            stopping.cancel()
        return fetching.result() if fetching.done() else []

    async def _fetch(self) -> list[Delivery[Group]]:
        """The next groups; none only when stopped."""
        deliveries: list[Delivery[Group]] = []

        async def take() -> None:
            nonlocal deliveries
            deliveries = await self._bus.take_groups(self._job.scorer.max_groups_per_batch, BLOCK_SECONDS)

        while not deliveries and not self._stop.is_set():
            await self._on_bus("taking groups", take)
        return deliveries

    async def _process(self, deliveries: Sequence[Delivery[Group]]) -> None:
        await self._engine.refresh_soon()
        held = self._engine.version
        early = [d for d in deliveries if held is None or d.value.dispatch_version > held]
        ready = [d for d in deliveries if d not in early]
        await self._settle(ready)
        if early and await self._newer_weights_came(early):
            await self._settle(early)

    async def _newer_weights_came(self, deliveries: Sequence[Delivery[Group]]) -> bool:
        """Wait for the version that all of these need. If it does not come, they are given back, and it is false."""
        needed = max(delivery.value.dispatch_version for delivery in deliveries)
        waiting = asyncio.create_task(self._engine.wait_for_version(needed, self._job.scorer.version_timeout_seconds))
        stopping = asyncio.create_task(self._stop.wait())
        try:
            with self._engine.activity.doing("wait_weights"):
                await asyncio.wait((waiting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                await self._give_back(deliveries)
                return False
            waiting.result()
        except DeadlineError as error:
            LOG.error("%s", error)
            for delivery in deliveries:
                await self._fail(delivery, error)
            return False
        finally:
            waiting.cancel()
            stopping.cancel()
        return True

    async def _settle(self, deliveries: Sequence[Delivery[Group]]) -> None:
        """Bring every delivery to its next state: scored, dropped, or given back for another attempt."""
        fresh = [d for d in deliveries if not await self._drop_if_stale(d, self._engine.version)]
        # Beside one another: they then go on the bus together.
        await all_ended([self._publish_or_drop(*pair) for pair in await self._score(fresh)])

    async def _publish_or_drop(self, delivery: Delivery[Group], scored: ScoredGroup) -> None:
        # A newer version may have been swapped in between the check and the forward pass.
        if not await self._drop_if_stale(delivery, scored.policy_version):
            await self._publish(delivery, scored)

    async def _score(self, deliveries: Sequence[Delivery[Group]]) -> list[tuple[Delivery[Group], ScoredGroup]]:
        """Scores of those that can be scored. If the batch fails, each is tried alone."""
        if not deliveries:
            return []
        try:
            scored = await self._engine.score([delivery.value for delivery in deliveries])
            return list(zip(deliveries, scored, strict=True))
        except RankLostError:
            raise  # nothing can be scored any more: the launcher starts all ranks again
        except SCORING_ERRORS as error:
            if len(deliveries) == 1:
                await self._refuse(deliveries[0], error)
                return []
            LOG.warning("a batch of %d groups failed, each is tried alone: %s", len(deliveries), error)
        return [pair for delivery in deliveries for pair in await self._score([delivery])]

    async def _refuse(self, delivery: Delivery[Group], error: Exception) -> None:
        if isinstance(error, WeightMissingError):
            LOG.warning("group %s is dropped: %s", delivery.group_id, error)
            await self._drop(delivery, str(error))
        else:
            LOG.error("group %s cannot be scored", delivery.group_id, exc_info=error)
            await self._fail(delivery, error)

    async def _drop_if_stale(self, delivery: Delivery[Group], version: int | None) -> bool:
        staleness = (version or 0) - delivery.value.oldest_version
        most = self._job.orchestrator.max_staleness
        if staleness <= most:
            return False
        await self._drop(delivery, f"{staleness} versions old when it was scored, {most} are allowed")
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
        """Do something on the bus, however long its server is away; given up only when stopped meanwhile.

        If the server lost the job's state, there is nothing left to do it to: the bus is begun anew.
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
