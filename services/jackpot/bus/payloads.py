"""Where the arrays lie while their claims travel through the streams: in Redis or in files, behind one interface.

A payload's name is unique to the call that stores it, so that a consumer whose lease ran out can never overwrite what
its successor has published.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from jackpot.bus.client import BusClient
from jackpot.bus.coalesce import Coalescer
from jackpot.errors import BusError, PayloadError, PayloadMissingError

# The envelope around a body of the greatest allowed size: its header, and what zstd adds to incompressible data.
ENVELOPE_BYTES = 64 << 10

TOGETHER_BELOW_BYTES = 64 << 10
"""Payloads below this size are written one after the other in one thread: starting one for each takes longer."""


def payload_name(group_id: str, stage: str) -> str:
    """A new name; ``stage`` is ``rollout`` or ``scored``."""
    return f"{group_id}.{stage}.{secrets.token_hex(6)}"


def group_of(name: str) -> str:
    """The group behind a payload's name."""
    return name.rsplit(".", 2)[0]


class PayloadStore(Protocol):
    """Holds payloads by name."""

    compress: bool  # whether payloads are worth compressing on their way to this store

    async def put(self, name: str, data: bytes) -> bytes:
        """Store a payload. Returns what the publishing script has to store itself, in one step with the state."""
        ...

    async def get(self, name: str) -> bytes:
        """Read a payload.

        Raises:
            PayloadMissingError: the store does not hold it.
            PayloadError: it is larger than any payload may be; nothing is read.
        """
        ...

    async def delete(self, name: str) -> None:
        """Remove a payload; no-op if it is gone already."""
        ...

    async def sweep(self, ended: Callable[[Sequence[str]], Awaitable[set[str]]]) -> int:
        """Remove what crashed processes left behind of groups that ``ended`` selects; how many payloads that were."""
        ...


class RedisPayloads:
    """Payloads in the bus's own server. The scripts store and unlink them together with the group's state."""

    compress = True

    def __init__(self, client: BusClient, max_bytes: int) -> None:
        self._client = client
        self._limit = max_bytes + ENVELOPE_BYTES

    async def put(self, name: str, data: bytes) -> bytes:
        return data

    async def get(self, name: str) -> bytes:
        key = self._client.keys.payload(group_of(name))
        size = await self._client.call("HSTRLEN", key, name)
        if size > self._limit:
            raise PayloadError(f"payload {name} has {size} bytes, more than bus.max_payload_bytes allows")
        data: bytes | None = await self._client.call("HGET", key, name)
        if data is None:
            raise PayloadMissingError(f"payload {name} is not on the bus's server")
        return data

    async def delete(self, name: str) -> None:
        await self._client.call("HDEL", self._client.keys.payload(group_of(name)), name)

    async def sweep(self, ended: Callable[[Sequence[str]], Awaitable[set[str]]]) -> int:
        return 0


class FilePayloads:
    """Payloads as files of one directory, shared by all processes of the job.

    Files are written aside and renamed. They are not synced: an operating-system crash may lose the last of them, as
    it may lose the server's last second; the checksum finds out.

    Args:
        directory: created if missing.
        max_bytes: largest body.
    """

    compress = False

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._limit = max_bytes + ENVELOPE_BYTES
        directory.mkdir(parents=True, exist_ok=True)
        self._in_thread: Coalescer[Callable[[], bytes], bytes] = Coalescer(_in_one_thread)

    async def put(self, name: str, data: bytes) -> bytes:
        write = partial(self._write, self._path(name), data)
        if len(data) < TOGETHER_BELOW_BYTES:
            return await self._in_thread(write)
        return await asyncio.to_thread(write)

    async def get(self, name: str) -> bytes:
        return await self._in_thread(partial(self._read, self._path(name)))

    async def delete(self, name: str) -> None:
        if name:
            self._path(name).unlink(missing_ok=True)

    async def sweep(self, ended: Callable[[Sequence[str]], Awaitable[set[str]]]) -> int:
        names = sorted(path.name for path in self._directory.iterdir() if path.is_file())
        groups = await ended(sorted({group_of(name.removesuffix(".tmp")) for name in names}))
        left_behind = [name for name in names if group_of(name.removesuffix(".tmp")) in groups]
        for name in left_behind:
            self._path(name).unlink(missing_ok=True)
        return len(left_behind)

    def _path(self, name: str) -> Path:
        if not name or Path(name).name != name:
            raise PayloadError(f"{name!r} is not a payload's name")
        return self._directory / name

    def _write(self, path: Path, data: bytes) -> bytes:
        aside = path.with_name(f"{path.name}.tmp")
        try:
            aside.write_bytes(data)
            aside.replace(path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise BusError(f"cannot store payload {path}: {error.strerror}. Free some space there.") from None
        return b""  # nothing for the script to store

    def _read(self, path: Path) -> bytes:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > self._limit:
                    raise PayloadError(f"payload {path} has {size} bytes, more than bus.max_payload_bytes allows")
                return file.read(self._limit)
        except FileNotFoundError:
            raise PayloadMissingError(f"payload {path} does not exist") from None
        except OSError as error:
            raise BusError(f"cannot read payload {path}: {error.strerror}") from None


async def _in_one_thread(calls: Sequence[Callable[[], bytes]]) -> Sequence[bytes | Exception]:
    return await asyncio.to_thread(lambda: [_outcome(call) for call in calls])


def _outcome(call: Callable[[], bytes]) -> bytes | Exception:
    try:
        return call()
    except Exception as error:  # each caller meets its own
        return error
