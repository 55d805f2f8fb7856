"""A consumer's end of one stream: it decides which entries are handed out, when, and how often.

One process hands nothing out twice. Entries whose replies were lost are read again, and expired leases are taken over.
A group that was tried before travels alone, so that a group that kills its consumer is identified and no neighbour is
blamed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from jackpot.bus.client import MAX_BLOCK_SECONDS, BusClient

GATHER_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Entry:
    """A claim on a group, as assigned to this consumer."""

    entry_id: str
    group_id: str
    payload: str
    attempt: int  # from 1: the number of the attempt that starts when the entry is handed out


class StreamReader:
    """Reads one stream as one consumer.

    Args:
        client: an open client.
        stream: the stream's key.
        consumers: the consumer group.
        consumer: this consumer's name, the same after a restart; the entries that it held come first.
        lease_seconds: how long a silent consumer keeps its entries.
        counts_attempts: whether hand-outs are counted. Entries tried before then travel alone, and an entry whose
            lease this process let expire is handed out again. False for a consumer that holds entries for long.
    """

    def __init__(
        self, client: BusClient, stream: str, consumers: str, consumer: str, lease_seconds: float, counts_attempts: bool
    ) -> None:
        self._client = client
        self._stream = stream
        self._consumers = consumers
        self._consumer = consumer
        self._lease_seconds = lease_seconds
        self._counts_attempts = counts_attempts
        self._lock = asyncio.Lock()
        self._released = asyncio.Event()
        self.restart()

    def restart(self) -> None:
        """Forget everything, like a new process: the job's state was created again."""
        self._cursor = "0-0"
        self._reclaim_cursor = "0-0"
        self._reclaim_at = 0.0
        self._last_delivered = "0-0"
        self._queue: dict[str, Entry] = {}  # by group: assigned to this consumer, not handed out
        self._held: dict[str, Entry] = {}  # by group: handed out
        self._released.set()

    async def next(self, max_entries: int, block_seconds: float, enough: int) -> list[Entry]:
        """Entries to work on, at most ``max_entries``; empty if none came within ``block_seconds``.

        If fewer than ``enough`` arrive, the call waits a moment for more: groups finish close together, and a round
        for each costs more than the wait.
        """
        deadline = time.monotonic() + block_seconds
        async with self._lock:
            while True:
                if not self._held_back():
                    await self._acquire(max_entries)
                    if 0 < len(self._queue) < enough:
                        await asyncio.sleep(GATHER_SECONDS)
                        await self._acquire(max_entries)
                    if chosen := await self._begin(self._choose(max_entries)):
                        return chosen
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return []
                await self._wait(min(remaining, MAX_BLOCK_SECONDS))

    def release(self, group_id: str) -> None:
        """Record that this process has finished with a group."""
        self._queue.pop(group_id, None)
        self._held.pop(group_id, None)
        self._released.set()

    def put_back(self, entries: Iterable[Entry]) -> None:
        """Queue entries again that :meth:`next` returned but that never reached the caller."""
        returned = {entry.group_id: entry for entry in entries if self._held.pop(entry.group_id, None)}
        self._queue = returned | self._queue
        self._released.set()

    async def renew(self) -> list[str]:
        """Renew the leases of all entries handed out and not released; returns the groups whose leases were lost."""
        entries = list(self._held.values())
        if not entries:
            return []
        mine = await self._hold([(entry.entry_id, entry.group_id, 0) for entry in entries])
        # An entry that this process released meanwhile was not lost.
        return [
            entry.group_id
            for entry, is_mine in zip(entries, mine, strict=True)
            if not is_mine and self._held.get(entry.group_id) is entry
        ]

    def _held_back(self) -> bool:
        """Whether nothing may be handed out until a held entry is released; see the module's docstring."""
        if not self._counts_attempts:
            return False
        tried_before = any(entry.attempt > 1 for entry in self._held.values())
        return tried_before or (bool(self._held) and any(entry.attempt > 1 for entry in self._queue.values()))

    def _choose(self, max_entries: int) -> list[Entry]:
        if self._held_back():
            return []
        if self._counts_attempts:
            for entry in self._queue.values():
                if entry.attempt > 1:
                    return [entry]
        return list(self._queue.values())[:max_entries]

    async def _acquire(self, max_entries: int) -> None:
        count = max_entries - len(self._queue)
        if count <= 0:
            return
        now = time.monotonic()
        lease_ms = max(1, round(self._lease_seconds * 1000)) if now >= self._reclaim_at else 0
        args = (self._consumers, self._consumer, self._cursor, count, lease_ms, self._reclaim_cursor)
        reply = await self._client.run("acquire", args, [self._stream])
        self._cursor, self._reclaim_cursor, self._last_delivered, entries = reply
        if lease_ms and self._reclaim_cursor == "0-0":
            self._reclaim_at = now + self._lease_seconds / 4
        for entry_id, group_id, payload, attempts, expired in entries:
            if group_id in self._held:
                if not (expired and self._counts_attempts):
                    continue
                del self._held[group_id]
            waiting = self._queue.get(group_id)
            if waiting is not None and waiting.entry_id == entry_id:
                continue
            self._queue[group_id] = Entry(entry_id, group_id, payload, attempts + 1)

    async def _begin(self, entries: list[Entry]) -> list[Entry]:
        """Count the attempts, and discard entries that other consumers took over while they were queued here."""
        if not entries:
            return []
        claims = [(e.entry_id, e.group_id, e.attempt if self._counts_attempts else 0) for e in entries]
        begun = []
        for entry, mine in zip(entries, await self._hold(claims), strict=True):
            del self._queue[entry.group_id]
            if mine:
                self._held[entry.group_id] = entry
                begun.append(entry)
        return begun

    async def _hold(self, claims: Sequence[tuple[str, str, int]]) -> list[int]:
        args = [self._consumers, self._consumer, *(value for claim in claims for value in claim)]
        held: list[int] = await self._client.run("hold", args, [self._stream])
        return held

    async def _wait(self, seconds: float) -> None:
        """Wait until there may be something to hand out; at most ``seconds``."""
        if self._held_back():
            self._released.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._released.wait()
        else:
            # A plain read after the last entry delivered to any consumer. It has no effect: a lost reply costs nothing.
            until_reclaim = max(self._reclaim_at - time.monotonic(), 0.01)
            block_ms = max(1, round(min(seconds, until_reclaim) * 1000))
            await self._client.call(
                "XREAD", "COUNT", 1, "BLOCK", block_ms, "STREAMS", self._stream, self._last_delivered
            )
