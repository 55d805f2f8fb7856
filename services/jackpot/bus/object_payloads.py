"""Payloads as objects in an S3-compatible store, for jobs whose pods share no files."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from jackpot.bus.payloads import ENVELOPE_BYTES, group_of
from jackpot.errors import BusError, ObjectMissingError, ObjectStoreError, PayloadError, PayloadMissingError
from jackpot.storage.objects import Objects

Result = TypeVar("Result")


class ObjectPayloads:
    """Stores payloads below one prefix. A group costs two writes, two reads and two deletions.

    Args:
        objects: the job's payloads, below their prefix.
        max_bytes: largest body.
    """

    compress = True

    def __init__(self, objects: Objects, max_bytes: int) -> None:
        self._objects = objects
        self._limit = max_bytes + ENVELOPE_BYTES

    async def put(self, name: str, data: bytes) -> bytes:
        await self._do(lambda: self._objects.put(_checked(name), data))
        return b""

    async def get(self, name: str) -> bytes:
        return await self._do(lambda: self._read(_checked(name)))

    async def delete(self, name: str) -> None:
        if name:
            await self._do(lambda: self._objects.delete([_checked(name)]))

    async def sweep(self, ended: Callable[[Sequence[str]], Awaitable[set[str]]]) -> int:
        names = [stored.key for stored in await self._do(self._objects.list)]
        groups = await ended(sorted({group_of(name) for name in names}))
        left_behind = [name for name in names if group_of(name) in groups]
        await self._do(lambda: self._objects.delete(left_behind))
        return len(left_behind)

    def _read(self, name: str) -> bytes:
        size = self._objects.size(name)
        if size > self._limit:
            where = self._objects.name(name)
            raise PayloadError(f"payload {where} has {size} bytes, more than bus.max_payload_bytes allows")
        return self._objects.get(name)[0]

    async def _do(self, call: Callable[[], Result]) -> Result:
        try:
            return await asyncio.to_thread(call)
        except ObjectMissingError as error:
            raise PayloadMissingError(f"payload {error}") from None
        except ObjectStoreError as error:
            raise BusError(f"payloads: {error}") from None


def _checked(name: str) -> str:
    if not name or "/" in name or name in (".", ".."):
        raise PayloadError(f"{name!r} is not a payload's name")
    return name
