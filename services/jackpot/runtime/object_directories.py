"""Directories kept as objects: the files first, then a manifest that names them with size and hash.

A directory without a manifest is not there: one that is being written, or was when its writer died. One process writes
and removes the directories below a prefix; any number reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jackpot.errors import ObjectConflictError, ObjectCorruptError
from jackpot.runtime.objects import ABSENT, Objects
from jackpot.runtime.weight_manifest import MANIFEST, WeightFile, describe_file


@dataclass(frozen=True, slots=True)
class StoredDirectory:
    """One directory that is there whole."""

    name: str
    bytes: int
    """Of all its files."""
    modified: float
    """When its manifest was written, seconds since 1970."""


class ObjectDirectories:
    """Directories by name, below one prefix.

    Args:
        objects: below which they lie.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def found(self) -> list[StoredDirectory]:
        """The directories that are there whole, by name."""
        return [found for found, whole in self._listed() if whole]

    def names(self) -> list[str]:
        """The names of the directories that are there whole, in order."""
        return [directory.name for directory in self.found()]

    def upload(self, name: str, directory: Path, manifest: bytes | None = None) -> None:
        """Write a directory: its files, and last the manifest that makes it appear.

        Args:
            name: of the directory.
            directory: with the files, subdirectories and all.
            manifest: JSON with the ``files``; None makes one of what is there.

        Raises:
            ObjectConflictError: another writer has put a directory of this name there, with other content.
            ObjectStoreError: as :class:`Objects`.
        """
        paths = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)
        keys = {str(path.relative_to(directory)): path for path in paths}
        if manifest is None:
            manifest = manifest_of({key: describe_file(path) for key, path in keys.items()})
        for key, path in keys.items():
            self._objects.upload(path, f"{name}/{key}")
        try:
            self._objects.put(f"{name}/{MANIFEST}", manifest, ABSENT)
        except ObjectConflictError:
            # Where an answer was lost on its way, the writer that came before is this one.
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
        """What a directory consists of.

        Raises:
            ObjectMissingError: there is no such directory.
            ObjectCorruptError: its manifest cannot be read.
            ObjectStoreError: as :class:`Objects`.
        """
        text = self.manifest(name)
        try:
            content = json.loads(text)
            files = {key: WeightFile(str(f["sha256"]), int(f["bytes"])) for key, f in content["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ObjectCorruptError(f"{self.where(name, MANIFEST)} cannot be read ({error!r})") from None
        if any(part in ("", ".", "..") for key in files for part in key.split("/")):
            raise ObjectCorruptError(f"{self.where(name, MANIFEST)} names files that lie elsewhere")
        return files

    def download(self, name: str, target: Path, files: Mapping[str, WeightFile] | None = None) -> None:
        """Read a directory's files into ``target``, which is there, each checked by size and hash.

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
                raise ObjectCorruptError(
                    f"{self.where(name, key)} does not match its manifest ({got.bytes} bytes, sha256 "
                    f"{got.sha256[:12]}…, expected {expected.bytes} bytes, sha256 {expected.sha256[:12]}…)"
                )

    def remove(self, name: str) -> None:
        """Remove a directory, the manifest first: it disappears whole."""
        self._objects.delete([f"{name}/{MANIFEST}"])
        self._objects.delete([found.key for found in self._objects.list(f"{name}/")])

    def sweep(self) -> list[str]:
        """Remove what a writer that died has left unfinished. To be called while nothing is written.

        Returns:
            The names of the directories that are there whole, in order.
        """
        listed = self._listed()
        for found, whole in listed:
            if not whole:
                self.remove(found.name)
        return [found.name for found, whole in listed if whole]

    def where(self, name: str, key: str = "") -> str:
        """The address of a directory, or of a file in it, for messages."""
        return self._objects.name("/".join(filter(None, (name, key))))

    def _listed(self) -> list[tuple[StoredDirectory, bool]]:
        """Every directory, and whether it is whole."""
        sizes: dict[str, int] = {}
        written: dict[str, float] = {}
        for found in self._objects.list():
            name, slash, key = found.key.partition("/")
            if not slash:
                continue
            sizes[name] = sizes.get(name, 0) + (0 if key == MANIFEST else found.bytes)
            if key == MANIFEST:
                written[name] = found.modified
        return [
            (StoredDirectory(name, size, written.get(name, 0.0)), name in written)
            for name, size in sorted(sizes.items())
        ]


def manifest_of(files: Mapping[str, WeightFile]) -> bytes:
    """A manifest of these files and nothing else."""
    content = {"files": {key: {"sha256": file.sha256, "bytes": file.bytes} for key, file in files.items()}}
    return (json.dumps(content, indent=1) + "\n").encode()
