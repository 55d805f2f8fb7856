"""The members of a download: local files, and objects of a store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from jackpot.errors import ObjectCorruptError
from jackpot.storage.objects import Objects
from jackpot.storage.weight_manifest import WeightFile

CHUNK_BYTES = 1 << 18


class Member(Protocol):
    """One file of a download."""

    name: str
    size: int
    modified: int  # seconds since 1970

    def chunks(self) -> Iterator[bytes]:
        """Its bytes: ``size`` of them, or an error."""
        ...

    def close(self) -> None:
        """Release its resources."""
        ...


class FileMember:
    """A file, open from the start."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        status = os.fstat(self._file.fileno())
        self.name, self.size, self.modified = path.name, status.st_size, int(status.st_mtime)

    def chunks(self) -> Iterator[bytes]:
        """As :meth:`Member.chunks`."""
        left = self.size
        while left:
            chunk = self._file.read(min(CHUNK_BYTES, left))
            if not chunk:
                raise OSError(f"{self.name} has shrunk while it was sent")
            left -= len(chunk)
            yield chunk

    def close(self) -> None:
        """As :meth:`Member.close`."""
        self._file.close()


class ObjectMember:
    """An object, read when its turn comes; its last piece is held back until the hash is known to be right."""

    def __init__(self, objects: Objects, key: str, file: WeightFile, modified: int) -> None:
        self._objects, self._expected = objects, file
        self.name, self.size, self.modified = key, file.bytes, modified

    def chunks(self) -> Iterator[bytes]:
        """As :meth:`Member.chunks`.

        Raises:
            ObjectStoreError: it cannot be read, or does not match its manifest.
        """
        digest, held = hashlib.sha256(), b""
        for chunk in self._objects.chunks(self.name, self.size):
            digest.update(chunk)
            if held:
                yield held
            held = chunk
        if digest.hexdigest() != self._expected.sha256:
            raise ObjectCorruptError(f"{self._objects.name(self.name)} does not match its manifest")
        yield held

    def close(self) -> None:
        """As :meth:`Member.close`."""
