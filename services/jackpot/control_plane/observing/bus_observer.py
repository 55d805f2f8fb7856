"""Reads a job's bus from outside; it never blocks the job and never fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from jackpot.bus import BusDepths, Ledger, TrajectoryBus
from jackpot.config import BusConfig
from jackpot.errors import BusError, ConfigError
from jackpot.storage.objects import Objects

ANSWER_SECONDS = 1.5

Answer = TypeVar("Answer")


class BusObserver:
    """Asks the bus for its figures; None if it does not answer soon, or has no address yet.

    Args:
        job_id: whose bus.
        settings: the job's ``bus`` section.
        payloads: place of the ``file`` or ``s3`` payload store.
    """

    def __init__(self, job_id: str, settings: BusConfig, payloads: Path | Objects) -> None:
        self._job_id = job_id
        self._settings = settings
        self._payloads = payloads
        self._bus: TrajectoryBus | None = None

    async def depths(self, url: str | None) -> BusDepths | None:
        """How much lies on the bus at ``url``."""
        return await self._ask(url, TrajectoryBus.depths)

    async def ledger(self, url: str | None) -> Ledger | None:
        """The counters of the bus at ``url``."""
        return await self._ask(url, TrajectoryBus.ledger)

    async def close(self) -> None:
        """Close the connection."""
        bus, self._bus = self._bus, None
        if bus is not None:
            await bus.close()

    async def _ask(self, url: str | None, question: Callable[[TrajectoryBus], Awaitable[Answer]]) -> Answer | None:
        if url is None:
            return None
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                if self._bus is None:
                    self._bus = await TrajectoryBus.connect(
                        url, self._job_id, self._settings, "launcher", self._payloads
                    )
                    await self._bus.open()
                return await question(self._bus)
        except (BusError, ConfigError, TimeoutError):
            await self.close()
            return None
