"""Stores of the arrays whose claims travel through the streams: in Redis or in files, behind one interface.

Each call that stores a payload gives it a unique name. A consumer whose lease expired can therefore never overwrite
what its successor has published.
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

# The envelope around a body of the largest allowed size: its header, and what zstd adds to incompressible data.
ENVELOPE_BYTES = 64 << 10

TOGETHER_BELOW_BYTES = 64 << 10
"""One thread writes payloads below this size one after another: starting a thread for each takes longer."""


def payload_name(group_id: str, stage: str) -> str:
    """A new name; ``stage`` is ``rollout`` or ``scored``."""
    return f"{group_id}.{stage}.{secrets.token_hex(6)}"


def group_of(name: str) -> str:
    """The group that a payload's name belongs to."""
    return name.rsplit(".", 2)[0]


class PayloadStore(Protocol):
    """Stores payloads by name."""

    compress: bool  # whether compressing payloads for this store pays off

    async def put(self, name: str, data: bytes) -> bytes:
        """Store a payload. Returns the bytes that the publishing script must store itself, together with the state."""
        ...

    async def get(self, name: str) -> bytes:
        """Read a payload.

        Raises:
            PayloadMissingError: the store does not hold it.
            PayloadError: it is larger than any payload may be; nothing is read.
        """
        ...

    async def delete(self, name: str) -> None:
        """Remove a payload; no-op if it does not exist."""
        ...

    async def sweep(self, ended: Callable[[Sequence[str]], Awaitable[set[str]]]) -> int:
        """Remove payloads that crashed processes left behind, of groups that ``ended`` selects; returns how many."""
        ...


class RedisPayloads:
    """Payloads in the bus's server. The scripts store and unlink them together with the group's state."""

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
    """Payloads as files in one directory that all processes of the job share.

    Files are written aside and renamed, but not synced: an operating-system crash may lose the last files, as it may
    lose the server's last second of writes. The checksum detects damage.

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
        return b""  # the script has nothing to store

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
    except Exception as error:  # each caller gets the error of its own call
        return error
