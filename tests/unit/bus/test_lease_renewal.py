"""Leases renewed in the background."""

from __future__ import annotations

import asyncio

import pytest
from patience import PATIENCE_SECONDS

from jackpot.bus.lease_renewal import leases_renewed
from jackpot.errors import BusError


async def test_a_renewal_that_fails_is_followed_by_the_next(caplog: pytest.LogCaptureFixture) -> None:
    """The server is restarted while a group is held: the lease outlives that."""
    attempts, renewed = 0, asyncio.Event()

    async def renew() -> list[str]:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise BusError("the server is away")
        renewed.set()
        return []

    async with leases_renewed(renew, 0.03):
        await asyncio.wait_for(renewed.wait(), PATIENCE_SECONDS)
    assert caplog.messages == ["leases not renewed: the server is away"]


async def test_nothing_is_renewed_after_the_work() -> None:
    attempts = 0

    async def renew() -> list[str]:
        nonlocal attempts
        attempts += 1
        return []

    before = asyncio.all_tasks()
    async with leases_renewed(renew, 3600.0):
        assert len(asyncio.all_tasks() - before) == 1
    assert asyncio.all_tasks() == before and attempts == 0
