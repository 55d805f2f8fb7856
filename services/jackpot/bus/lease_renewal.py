"""Renews leases in the background, so that work may take longer than a lease lasts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

from jackpot.errors import BusError

LOG = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 3
"""If one renewal fails, the next still comes in time."""


@asynccontextmanager
async def leases_renewed(renew: Callable[[], Awaitable[Sequence[str]]], lease_seconds: float) -> AsyncIterator[None]:
    """Renew leases while the ``with`` block runs.

    A lost lease is logged once, and the work continues: if two results arrive for one group, the bus takes the first.

    Args:
        renew: renews the held leases and returns the groups whose leases were lost.
        lease_seconds: how long a lease lasts.
    """
    task = asyncio.create_task(_renew_repeatedly(renew, lease_seconds / RENEWALS_PER_LEASE))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _renew_repeatedly(renew: Callable[[], Awaitable[Sequence[str]]], interval_seconds: float) -> None:
    logged: set[str] = set()
    while True:
        await asyncio.sleep(interval_seconds)
        try:
            lost = set(await renew())
        except BusError as error:
            LOG.warning("leases not renewed: %s", error)
            continue
        for group_id in sorted(lost - logged):
            LOG.warning("the lease of group %s was lost: another consumer took it over, or it has ended", group_id)
        logged = lost
