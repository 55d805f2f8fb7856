"""Versioned weights in an object store. A local directory holds copies of the versions that were read last.

Below ``<role>/`` of the prefix lie ``<version:08d>/`` with the files and ``manifest.json``, which is written last, and
``LATEST``, which is written conditionally, so that no other write is lost, and never moves backwards.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from jackpot.errors import (
    ObjectConflictError,
    ObjectCorruptError,
    ObjectMissingError,
    ObjectUnavailableError,
    WeightCorruptError,
    WeightError,
    WeightMissingError,
)
from jackpot.storage.object_directories import ObjectDirectories
from jackpot.storage.objects import ABSENT, Objects
from jackpot.storage.weight_manifest import MANIFEST, WeightManifest, parse_manifest
from jackpot.storage.weights import LATEST, WeightStore

LOG = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
"""Shortest time between two checks for a newer version, however often callers ask: each request costs money."""
LOOK_SECONDS_IN_OUTAGE = 5.0
COPIES = 2
"""Versions of a role that stay on this machine, besides the one opened last."""


class ObjectWeightStore(WeightStore):
    """A weight store in a bucket. As with a directory, one process may publish and prune a role; anyone may read.

    Args:
        objects: the prefix of the job's weights; publishing and opening retry for its ``outage_seconds``.
        copies: directory for copies, of this process alone; created when needed.
    """

    def __init__(self, objects: Objects, copies: Path) -> None:
        super().__init__(copies)
        self._objects = objects
        self._quick = objects.below(outage_seconds=0.0)
        self._local = WeightStore(copies)
        self._turn = threading.Lock()  # copies are made one at a time
        self._known: dict[str, WeightManifest | None] = {}
        self._look_at: dict[str, float] = {}  # monotonic
        self._is_out = False

    def publish(
        self, role: str, version: int, write: Callable[[Path], None], metadata: Mapping[str, Any]
    ) -> WeightManifest:
        """As :meth:`WeightStore.publish`; the version appears with its manifest, after all of its files.

        Raises:
            WeightError: as there.
            ObjectStoreError: the store refuses, or is out of reach for too long.
        """
        if version < 0:
            raise WeightError(f"weight version {version} is negative. Versions are optimizer steps, counted from 0.")
        try:
            manifest = self.manifest(role, version)
        except WeightCorruptError:
            self._directories(role).remove(_name(version))
            manifest = self._write(role, version, write, metadata)
        except WeightMissingError:
            manifest = self._write(role, version, write, metadata)
        self._move_newest(role, version)
        return manifest

    def latest(self, role: str) -> WeightManifest | None:
        """The newest version of ``role``, or None before the first. Checks at most every :data:`LOOK_SECONDS`; while
        the store is out of reach, returns the newest known version.

        Raises:
            WeightError: ``LATEST`` is damaged, or names a version that is not there.
        """
        now = time.monotonic()
        if now < self._look_at.get(role, 0.0):
            return self._known.get(role)
        self._look_at[role] = now + LOOK_SECONDS
        try:
            self._known[role] = self._look(role)
        except ObjectUnavailableError as error:
            self._look_at[role] = time.monotonic() + LOOK_SECONDS_IN_OUTAGE
            if not self._is_out:
                LOG.warning("newer weights cannot be found for now: %s", error)
            self._is_out = True
            return self._known.get(role)
        if self._is_out:
            LOG.info("the object store answers again")
        self._is_out = False
        return self._known[role]

    def mark(self, role: str) -> object:
        """See :meth:`WeightStore.mark`; for a bucket it would cost as much as :meth:`latest`."""
        return None

    def manifest(self, role: str, version: int) -> WeightManifest:
        """As :meth:`WeightStore.manifest`."""
        return self._manifest(self._objects, role, version)

    def open(self, role: str, version: int) -> Path:
        """As :meth:`WeightStore.open`; read from the store unless this machine has an intact copy.

        Raises:
            WeightError: as there.
            ObjectStoreError: the store refuses, or is out of reach for too long.
        """
        with self._turn:
            manifest = self.manifest(role, version)

            def read(directory: Path) -> None:
                self._directories(role).download(_name(version), directory, manifest.files)

            try:
                copy = self._local.publish(role, version, read, manifest.metadata)
                if copy != manifest:  # an older copy of a version that was trained again
                    self._local.discard(role, version)
                    copy = self._local.publish(role, version, read, manifest.metadata)
            except ObjectMissingError:
                self.manifest(role, version)  # raises that the version is missing, if it was pruned meanwhile
                raise WeightCorruptError(
                    f"files of version {version} of the {role}'s weights are missing from {self._where(role, version)}"
                ) from None
            except ObjectCorruptError as error:
                raise WeightCorruptError(str(error)) from None
            self._local.prune(role, COPIES, [version])
            return copy.path

    def versions(self, role: str) -> list[int]:
        """As :meth:`WeightStore.versions`."""
        return sorted(int(name) for name in self._directories(role).names() if name.isdecimal())

    def prune(self, role: str, keep: int, pinned: Collection[int] = ()) -> list[int]:
        """As :meth:`WeightStore.prune`."""
        self._local.prune(role, COPIES)
        directories = self._directories(role)
        versions = sorted(int(name) for name in directories.sweep() if name.isdecimal())
        newest, _ = self._newest(self._objects, role)
        removed = [v for v in versions[: max(0, len(versions) - keep)] if v != newest and v not in pinned]
        for version in removed:
            directories.remove(_name(version))
        return removed

    def _write(
        self, role: str, version: int, write: Callable[[Path], None], metadata: Mapping[str, Any]
    ) -> WeightManifest:
        self._local.discard(role, version)  # of a writer that died before the version became visible
        manifest = self._local.publish(role, version, write, metadata)
        self._directories(role).upload(_name(version), manifest.path, (manifest.path / MANIFEST).read_bytes())
        return manifest

    def _look(self, role: str) -> WeightManifest | None:
        version, _ = self._newest(self._quick, role)
        while version is not None:
            known = self._known.get(role)
            if known is not None and known.version == version:
                return known
            try:
                return self._manifest(self._quick, role, version)
            except WeightMissingError:
                # A newer version was published and this one pruned between our two reads; otherwise it is lost.
                newer, _ = self._newest(self._quick, role)
                if newer == version:
                    raise
                version = newer
        return None

    def _manifest(self, objects: Objects, role: str, version: int) -> WeightManifest:
        try:
            text = ObjectDirectories(objects.below(role)).manifest(_name(version)).decode("utf-8", "replace")
        except ObjectMissingError:
            raise WeightMissingError(
                f"version {version} of the {role}'s weights is not in {self._objects.name()}. "
                "It was never published or is pruned already; take the latest version, or raise weights.keep_versions."
            ) from None
        directory = self._root / role / _name(version)
        return parse_manifest(text, role, version, directory, f"{self._where(role, version)}/{MANIFEST}")

    def _newest(self, objects: Objects, role: str) -> tuple[int | None, str]:
        """The version in ``LATEST``, and the object's tag."""
        key = f"{role}/{LATEST}"
        try:
            data, tag = objects.get(key)
        except ObjectMissingError:
            return None, ABSENT
        text = data.decode("utf-8", "replace").strip()
        if not text.isdecimal():
            raise WeightCorruptError(f"{objects.name(key)} holds {text[:40]!r} instead of a version. Delete it.")
        return int(text), tag

    def _move_newest(self, role: str, version: int) -> None:
        while True:
            newest, tag = self._newest(self._objects, role)
            if newest is not None and newest >= version:
                return
            try:
                return self._objects.put(f"{role}/{LATEST}", f"{version}\n".encode(), tag)
            except ObjectConflictError:
                continue  # written meanwhile, perhaps by this call: read again

    def _directories(self, role: str) -> ObjectDirectories:
        return ObjectDirectories(self._objects.below(role))

    def _where(self, role: str, version: int) -> str:
        return self._objects.name(f"{role}/{_name(version)}")


def _name(version: int) -> str:
    return f"{version:08d}"
