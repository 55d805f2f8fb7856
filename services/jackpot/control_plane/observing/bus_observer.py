"""Reads a job's bus from outside; it never blocks the job and never fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from jackpot.bus import BusDepths, BusReadings, Ledger
from jackpot.config import BusConfig
from jackpot.errors import BusError, ConfigError

ANSWER_SECONDS = 1.5

Answer = TypeVar("Answer")


class BusObserver:
    """Asks the bus for its figures; None if it does not answer soon, or has no address yet.

    Args:
        job_id: whose bus.
        settings: the job's ``bus`` section.
    """

    def __init__(self, job_id: str, settings: BusConfig) -> None:
        self._job_id = job_id
        self._settings = settings
        self._bus: BusReadings | None = None

    async def depths(self, url: str | None) -> BusDepths | None:
        """How much lies on the bus at ``url``."""
        return await self._ask(url, BusReadings.depths)

    async def ledger(self, url: str | None) -> Ledger | None:
        """The counters of the bus at ``url``."""
        return await self._ask(url, BusReadings.ledger)

    async def close(self) -> None:
        """Close the connection."""
        bus, self._bus = self._bus, None
        if bus is not None:
            await bus.close()

    async def _ask(self, url: str | None, question: Callable[[BusReadings], Awaitable[Answer]]) -> Answer | None:
        if url is None:
            return None
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                if self._bus is None:
                    self._bus = await BusReadings.connect(url, self._job_id, self._settings)
                return await question(self._bus)
        except (BusError, ConfigError, TimeoutError):
            await self.close()
            return None
