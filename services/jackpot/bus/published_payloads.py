"""Publishes payloads: a payload is stored first, then a script makes the claim on it valid."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jackpot.bus.client import BusClient
from jackpot.bus.ledger import Value
from jackpot.bus.payloads import PayloadStore, payload_name
from jackpot.errors import PayloadError
from jackpot.trajectory import ScoredGroup

Result = TypeVar("Result")

THREAD_FROM_VALUES = 16_384
"""Groups with at least this many numbers are converted in a thread; smaller ones convert faster than a thread
switch."""
VALUE_BYTES = 4


class PublishedPayloads:
    """Writes and reads groups through a payload store.

    Args:
        client: an open client.
        store: holds the payloads.
        max_bytes: largest payload, before compression.
    """

    def __init__(self, client: BusClient, store: PayloadStore, max_bytes: int) -> None:
        self._client = client
        self._store = store
        self._max_bytes = max_bytes
        # Payloads whose publication was interrupted, by group and stage. Their claims may have become valid, so they
        # cannot be removed. The script recognises a retry by the payload's name.
        self._unsettled: dict[tuple[str, str], str] = {}

    async def publish(
        self, script: str, stage: str, group: Value, encode: Callable[..., bytes], args: Sequence[Any] = ()
    ) -> str:
        """Store a group and run the script that publishes it; returns the script's answer.

        If the script refuses the claim, the payload is removed again.
        """
        group_id = group.group_id
        data = await _off_the_loop(
            _num_values(group), encode, group, compress=self._store.compress, max_bytes=self._max_bytes
        )
        name = self._unsettled.setdefault((group_id, stage), payload_name(group_id, stage))
        inline = await self._store.put(name, data)
        extra_keys = [self._client.keys.payload(group_id)]
        outcome: str = await self._client.run(script, [group_id, *args, name, len(data), inline], extra_keys)
        self._unsettled.pop((group_id, stage), None)
        if outcome != "published":
            await self._store.delete(name)
        return outcome

    async def load(self, group_id: str, name: str, decode: Callable[..., Value]) -> Value:
        """Read a group.

        Raises:
            PayloadError: the payload is missing, unreadable, or another group's.
        """
        data = await self._store.get(name)
        value = await _off_the_loop(len(data) // VALUE_BYTES, decode, data, max_bytes=self._max_bytes)
        if value.group_id != group_id:
            raise PayloadError(f"payload {name} holds group {value.group_id}")
        return value


def _num_values(group: Value) -> int:
    """The approximate count of numbers in a group's arrays."""
    inner = group.group if isinstance(group, ScoredGroup) else group
    topk = inner.trajectories[0].topk_ids if inner.trajectories else None
    return inner.num_tokens * (8 + (0 if topk is None else 2 * topk.shape[-1]))


async def _off_the_loop(num_values: int, convert: Callable[..., Result], *args: Any, **options: Any) -> Result:
    if num_values < THREAD_FROM_VALUES:
        return convert(*args, **options)
    return await asyncio.to_thread(convert, *args, **options)
