"""Work beside the steps: one piece at a time, and no failure is lost."""

from __future__ import annotations

import asyncio
import threading

import pytest

from jackpot.learner.publishing.background import BackgroundWork


async def test_the_next_piece_waits_for_the_one_before() -> None:
    background, done, go = BackgroundWork(), [], threading.Event()

    def first() -> None:
        assert go.wait(10)
        done.append("first")

    await background.start(first)
    second = asyncio.create_task(background.start(lambda: done.append("second")))
    await asyncio.sleep(0)
    background.check()
    assert done == []
    go.set()
    await second
    await background.finish()
    assert done == ["first", "second"]


def fail() -> None:
    raise OSError("no space left on device")


async def test_a_failure_is_raised_before_anything_is_begun_on_top_of_it() -> None:
    background, done = BackgroundWork(), []
    await background.start(fail)
    with pytest.raises(OSError, match="no space"):
        await background.start(lambda: done.append("on top"))
    await background.finish()
    assert done == []


async def test_a_failure_is_seen_by_who_only_looks() -> None:
    background = BackgroundWork()
    await background.start(fail)
    with pytest.raises(OSError, match="no space"):
        for _ in range(1000):
            background.check()
            await asyncio.sleep(0.01)
    background.check()
