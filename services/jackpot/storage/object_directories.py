"""Directories kept as objects: the files first, then a manifest that names them with size and hash.

A directory without a manifest does not count: it is being written, or its writer died. One process writes and removes
the directories below a prefix; any number reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jackpot.errors import DirectoryDamagedError, ObjectConflictError, ObjectCorruptError, ObjectMissingError
from jackpot.storage.directory_manifest import describe_directory, files_of, manifest_of
from jackpot.storage.objects import ABSENT, Objects
from jackpot.storage.weight_manifest import MANIFEST, WeightFile, describe_file, mismatch


@dataclass(frozen=True, slots=True)
class StoredDirectory:
    """One complete directory."""

    name: str
    bytes: int
    """Total size of its files."""
    modified: float
    """When its manifest was written, seconds since 1970."""


class ObjectDirectories:
    """Directories by name, below one prefix.

    Args:
        objects: the prefix.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def found(self) -> list[StoredDirectory]:
        """The complete directories, by name."""
        return [directory for directory, whole in self._listed() if whole]

    def names(self) -> list[str]:
        """The names of the complete directories, in order."""
        return [directory.name for directory in self.found()]

    def upload(self, name: str, directory: Path, manifest: bytes | None = None) -> None:
        """Write a directory: its files first, then the manifest that makes it visible.

        Args:
            name: of the directory.
            directory: with the files, subdirectories included.
            manifest: JSON with the ``files``; None makes one of the directory's files.

        Raises:
            ObjectConflictError: another writer has written a directory of this name with other content.
            ObjectStoreError: as :class:`Objects`.
        """
        if manifest is None:
            manifest = manifest_of(describe_directory(directory))
        for key in files_of(manifest, str(directory / MANIFEST)):
            self._objects.upload(directory / key, f"{name}/{key}")
        try:
            self._objects.put(f"{name}/{MANIFEST}", manifest, ABSENT)
        except ObjectConflictError:
            # If the answer to an earlier attempt was lost, the other writer is this one.
            if self.manifest(name) != manifest:
                raise

    def manifest(self, name: str) -> bytes:
        """The manifest of a directory.

        Raises:
            ObjectMissingError: there is no such directory.
            ObjectStoreError: as :class:`Objects`.
        """
        return self._objects.get(f"{name}/{MANIFEST}")[0]

    def files(self, name: str) -> dict[str, WeightFile]:
        """The contents of a directory.

        Raises:
            ObjectMissingError: there is no such directory.
            ObjectCorruptError: its manifest cannot be read.
            ObjectStoreError: as :class:`Objects`.
        """
        try:
            return files_of(self.manifest(name), self.where(name, MANIFEST))
        except DirectoryDamagedError as error:
            raise ObjectCorruptError(str(error)) from None

    def download(self, name: str, target: Path, files: Mapping[str, WeightFile] | None = None) -> None:
        """Read a directory's files into the existing ``target``, each checked by size and hash.

        Raises:
            ObjectMissingError: there is no such directory (any more).
            ObjectCorruptError: a file does not match the manifest.
            ObjectStoreError: as :class:`Objects`.
        """
        for key, expected in (self.files(name) if files is None else files).items():
            path = target / key
            path.parent.mkdir(parents=True, exist_ok=True)
            self._objects.download(f"{name}/{key}", path)
            if (got := describe_file(path)) != expected:
                raise ObjectCorruptError(mismatch(self.where(name, key), got, expected))

    def remove(self, name: str) -> None:
        """Remove a directory, the manifest first, so that it disappears at once."""
        self._objects.delete([f"{name}/{MANIFEST}"])
        self._objects.delete([info.key for info in self._objects.list(f"{name}/")])

    def sweep(self) -> list[str]:
        """Remove incomplete directories of a writer that died. Call it while nothing is being written.

        Returns:
            The names of the complete directories, in order.
        """
        listed = self._listed()
        for directory, whole in listed:
            if not whole:
                self.remove(directory.name)
        return [directory.name for directory, whole in listed if whole]

    def point(self, pointer: str, name: str) -> None:
        """Write a small object beside the directories that names one of them, replacing it atomically.

        Args:
            pointer: the object's key.
            name: of the directory.
        """
        self._objects.put(pointer, f"{name}\n".encode())

    def pointed(self, pointer: str) -> str | None:
        """The name in such an object, whether or not that directory exists; None without the object."""
        try:
            return self._objects.get(pointer)[0].decode(errors="replace").strip()
        except ObjectMissingError:
            return None

    def where(self, name: str, key: str = "") -> str:
        """The address of a directory, or of a file in it, for messages."""
        return self._objects.name("/".join(filter(None, (name, key))))

    def _listed(self) -> list[tuple[StoredDirectory, bool]]:
        """Every directory, and whether it is complete."""
        sizes: dict[str, int] = {}
        written: dict[str, float] = {}
        for info in self._objects.list():
            name, slash, key = info.key.partition("/")
            if not slash:
                continue
            sizes[name] = sizes.get(name, 0) + (0 if key == MANIFEST else info.bytes)
            if key == MANIFEST:
                written[name] = info.modified
        return [
            (StoredDirectory(name, size, written.get(name, 0.0)), name in written)
            for name, size in sorted(sizes.items())
        ]
