"""Copies the ends of groups from the bus to the ledger on disk and to the slots."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from jackpot.bus import BusReadings
from jackpot.orchestrator.ledger import LedgerFile
from jackpot.orchestrator.slots import SlotBook
from jackpot.telemetry import Metrics
from jackpot.trajectory import GroupKey

LOG = logging.getLogger(__name__)

POLL_SECONDS = 0.05  # how long a dropped group's slot may stay empty
PAGE = 1000


class LedgerSync:
    """Reads the bus's terminal records from the start; the file recognises those that it already has.

    Args:
        bus_readings: the readings of an open bus.
        file: the ledger on disk.
        book: the holders of the slots.
        metrics: counts ended groups.
        on_ended: called after groups ended.
    """

    def __init__(
        self,
        bus_readings: BusReadings,
        file: LedgerFile,
        book: SlotBook,
        metrics: Metrics,
        on_ended: Callable[[], None],
    ) -> None:
        self._bus_readings = bus_readings
        self._file = file
        self._book = book
        self._metrics = metrics
        self._on_ended = on_ended
        metrics.expect_groups()
        self._after = ""
        self.succeeded_at = time.monotonic()  # when the bus last answered

    async def run(self) -> None:
        """Copy records until cancelled."""
        while True:
            await self.catch_up()
            self.succeeded_at = time.monotonic()
            await asyncio.sleep(POLL_SECONDS)

    def rewind(self) -> None:
        """Read from the start again: the bus may be a different one."""
        self._after = ""

    async def catch_up(self) -> None:
        """Copy all available records."""
        while records := await self._bus_readings.read_terminal(self._after, PAGE):
            rows = [record for _, record in records]
            for row in await asyncio.to_thread(self._file.append, rows):
                self._metrics.count_group(row.state, row.reason)
            for row in rows:
                self._book.close(GroupKey.parse(row.group_id), row.state, row.reason)
            self._after = records[-1][0]
            self._on_ended()
