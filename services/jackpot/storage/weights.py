"""Versioned weights on a shared directory: one writer per role, any number of readers, no locks.

A version is a directory ``<root>/<role>/<version:08d>`` with safetensors files and ``manifest.json``. It appears
atomically (written aside, fsynced, renamed) and disappears atomically, so that a reader finds all of it or nothing.
``<root>/<role>/LATEST`` names the newest version and never moves backwards.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from jackpot.errors import DeadlineError, WeightCorruptError, WeightError, WeightMissingError
from jackpot.storage.durable_files import replace_synced, sync, sync_tree
from jackpot.storage.weight_manifest import (
    MANIFEST,
    RESTORE,
    WeightManifest,
    describe_file,
    manifest_text,
    mismatch,
    parse_manifest,
)

LATEST = "LATEST"
_VERSION_NAME = re.compile(r"\d{8,}")


class WeightStore:
    """Publishes, finds, verifies and prunes weight versions under ``root``.

    Only one process at a time may publish and prune a role (the learner); anyone may read.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._being_written: set[Path] = set()

    def publish(
        self, role: str, version: int, write: Callable[[Path], None], metadata: Mapping[str, Any]
    ) -> WeightManifest:
        """Publish a version atomically.

        An intact version of this number is left as it is; a damaged one is replaced.

        Args:
            role: whose weights these are: ``policy`` or ``actor``.
            version: the optimizer step that produced them, ≥ 0.
            write: writes the files (no subdirectories) into the directory that it receives.
            metadata: JSON values that readers receive with the manifest.

        Raises:
            WeightError: the version is negative or ``write`` wrote no files.
        """
        if version < 0:
            raise WeightError(f"weight version {version} is negative. Versions are optimizer steps, counted from 0.")
        final = self._directory(role, version)
        try:
            manifest = self._verified(role, version)
        except WeightError:
            manifest = self._write_version(role, version, final, write, metadata)
        self._move_latest(role, version)
        return manifest

    def latest(self, role: str) -> WeightManifest | None:
        """The newest version of ``role``, or None before the first. Reads two small files, and so is cheap to poll.

        Raises:
            WeightError: ``LATEST`` is damaged, or names a missing version.
        """
        version = self._read_latest(role)
        while version is not None:
            try:
                return self.manifest(role, version)
            except WeightMissingError:
                # A newer version was published and this one pruned between our two reads; otherwise it is lost.
                newer = self._read_latest(role)
                if newer == version:
                    raise
                version = newer
        return None

    def mark(self, role: str) -> object:
        """A value that changes with each publication. It does not read the version: a hundred times cheaper than
        :meth:`latest`. A store without such a value always returns the same one."""
        try:
            status = (self._root / role / LATEST).stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns

    def manifest(self, role: str, version: int) -> WeightManifest:
        """The manifest of a version, its files not yet verified.

        Raises:
            WeightMissingError: the store does not hold the version (any more).
            WeightCorruptError: its manifest cannot be read.
        """
        directory = self._directory(role, version)
        try:
            text = (directory / MANIFEST).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise WeightMissingError(
                f"version {version} of the {role}'s weights is not in {self._root}. "
                "It was never published or is pruned already; take the latest version, or raise weights.keep_versions."
            ) from None
        return parse_manifest(text, role, version, directory)

    def open(self, role: str, version: int) -> Path:
        """The directory of a version, every file's size and SHA-256 checked.

        The files may be pruned later: a reader then gets FileNotFoundError and should take the latest.

        Raises:
            WeightMissingError: the store does not hold the version (any more).
            WeightCorruptError: a file differs from its manifest.
        """
        return self._verified(role, version).path

    def versions(self, role: str) -> list[int]:
        """The existing versions of ``role``, ascending."""
        names = _names_in(self._root / role)
        return sorted(int(name) for name in names if _VERSION_NAME.fullmatch(name))

    def prune(self, role: str, keep: int, pinned: Collection[int] = ()) -> list[int]:
        """Delete all but the newest ``keep`` versions, and leftovers of a crashed writer.

        The latest version and those in ``pinned`` always stay.

        Returns:
            The versions that were deleted.
        """
        role_directory = self._root / role
        latest = self._read_latest(role)
        versions = self.versions(role)
        removed = [v for v in versions[: max(0, len(versions) - keep)] if v != latest and v not in pinned]
        for version in removed:
            self._remove(self._directory(role, version))
        for name in _names_in(role_directory):
            path = role_directory / name
            # One writer per role: any other unfinished write is abandoned.
            if name.startswith(".") and path not in self._being_written:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        return removed

    def discard(self, role: str, version: int) -> None:
        """Remove a version in any state; no-op if it does not exist."""
        directory = self._directory(role, version)
        if directory.exists():
            self._remove(directory)

    def _directory(self, role: str, version: int) -> Path:
        return self._root / role / f"{version:08d}"

    def _write_version(
        self, role: str, version: int, final: Path, write: Callable[[Path], None], metadata: Mapping[str, Any]
    ) -> WeightManifest:
        aside = _aside(final)
        self._being_written.add(aside)
        try:
            aside.mkdir(parents=True)
            write(aside)
            files = {path.name: describe_file(path) for path in sorted(aside.iterdir())}
            if not files:
                raise WeightError(f"version {version} of the {role}'s weights has no files. Nothing was published.")
            manifest = WeightManifest(role, version, files, dict(metadata), final)
            (aside / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
            sync_tree(aside)
            if final.exists():
                self._remove(final)
            aside.rename(final)
            sync(final.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            self._being_written.discard(aside)
        return manifest

    def _verified(self, role: str, version: int) -> WeightManifest:
        manifest = self.manifest(role, version)
        for name, expected in manifest.files.items():
            path = manifest.path / name
            try:
                actual = describe_file(path)
            except FileNotFoundError:
                self.manifest(role, version)  # raises that the version is missing, if it was pruned meanwhile
                raise WeightCorruptError(f"{path} is missing although its manifest names it. {RESTORE}") from None
            if actual != expected:
                raise WeightCorruptError(f"{mismatch(str(path), actual, expected)}. {RESTORE}")
        return manifest

    def _read_latest(self, role: str) -> int | None:
        path = self._root / role / LATEST
        try:
            text = path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        if not text.isdecimal():
            raise WeightCorruptError(f"{path} holds {text[:40]!r} instead of a version. {RESTORE}")
        return int(text)

    def _move_latest(self, role: str, version: int) -> None:
        current = self._read_latest(role)
        if current is not None and current >= version:
            return
        final = self._root / role / LATEST
        aside = _aside(final)
        self._being_written.add(aside)
        try:
            replace_synced(final, f"{version}\n", aside)
        finally:
            aside.unlink(missing_ok=True)
            self._being_written.discard(aside)

    def _remove(self, directory: Path) -> None:
        aside = _aside(directory)
        directory.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


async def wait_for_version(
    store: WeightStore, role: str, min_version: int, timeout_seconds: float, poll_seconds: float = 0.05
) -> WeightManifest:
    """The latest version of ``role`` as soon as it is at least ``min_version``.

    Raises:
        DeadlineError: it was not published in time.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        manifest = await asyncio.to_thread(store.latest, role)
        if manifest is not None and manifest.version >= min_version:
            return manifest
        if time.monotonic() >= deadline:
            held = "none is published" if manifest is None else f"the latest is {manifest.version}"
            raise DeadlineError(
                f"version {min_version} of the {role}'s weights ({held})", timeout_seconds, "Look at the learner's log."
            )
        await asyncio.sleep(poll_seconds)


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}")


def _names_in(directory: Path) -> Iterable[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []
