"""New versions are noticed without waiting for the next look at the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from jackpot.errors import DeadlineError
from jackpot.orchestrator.versions import VersionWatch
from jackpot.storage.weights import WeightStore

HOUR = 3600.0


def publish(store: WeightStore, role: str, version: int) -> None:
    store.publish(role, version, lambda directory: (directory / "w").write_bytes(b"%d" % version) and None, {})


@asynccontextmanager
async def watching(store: WeightStore, poll_seconds: float) -> AsyncIterator[VersionWatch]:
    watch = VersionWatch(store, ["policy", "actor"], poll_seconds)
    task = asyncio.create_task(watch.watch())
    try:
        yield watch
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_versions_are_noticed_long_before_the_next_poll(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    async with watching(store, HOUR) as watch:
        for version in (0, 1, 2):
            await asyncio.to_thread(publish, store, "actor", version)
            assert await watch.wait("actor", version, timeout_seconds=20) == version
        assert watch.published == {"actor": 2}


async def test_a_store_that_cannot_tell_is_polled(tmp_path: Path) -> None:
    class Blind(WeightStore):
        def mark(self, role: str) -> object:
            return None

    store = Blind(tmp_path)
    async with watching(store, 0.01) as watch:
        publish(store, "policy", 4)
        assert await watch.wait("policy", 1, timeout_seconds=20) == 4
    async with watching(store, HOUR) as watch:
        await watch.wait("policy", 4, timeout_seconds=20)
        publish(store, "policy", 5)
        with pytest.raises(DeadlineError, match="version 5 of the policy's weights"):
            await watch.wait("policy", 5, timeout_seconds=0.1)


def test_a_mark_changes_with_each_publication_and_only_then(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    marks = [store.mark("policy")]
    for version in range(3):
        publish(store, "policy", version)
        marks.append(store.mark("policy"))
        assert store.mark("policy") == marks[-1]
        publish(store, "actor", version)
        assert store.mark("policy") == marks[-1]
    assert len(set(marks)) == 4
