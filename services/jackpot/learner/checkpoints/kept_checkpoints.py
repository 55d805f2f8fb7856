"""A job's checkpoints: which are complete, which one is the latest, which are kept.

A checkpoint is written aside, gets a manifest with every file's size and hash, is synced and renamed; then ``latest``
names it. With an object store a checkpoint exists once the store holds it; the directory keeps a copy of the newest.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from pathlib import Path

from jackpot.errors import DirectoryDamagedError, JackpotError, ObjectCorruptError, ObjectMissingError, ObjectStoreError
from jackpot.storage.directory_manifest import check_directory, describe_directory, manifest_of
from jackpot.storage.durable_files import sync, sync_tree
from jackpot.storage.latest_checkpoint import LATEST, STEP_NAME, by_preference, read_latest, write_latest
from jackpot.storage.object_directories import ObjectDirectories
from jackpot.storage.run_records import best_step
from jackpot.storage.weight_manifest import MANIFEST

LOG = logging.getLogger(__name__)


class KeptCheckpoints:
    """Checkpoints as directories named by step, and the pointer to one of them. For one process at a time.

    Args:
        directory: of the checkpoints, or of their copies; created if missing.
        keep: how many of the newest are kept.
        evaluations: ``evaluations.jsonl``, by which the best policy's checkpoint is kept as well; None keeps only the
            newest.
        stored: the job's checkpoints in an object store; None keeps them in ``directory``.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        evaluations: Path | None = None,
        stored: ObjectDirectories | None = None,
    ) -> None:
        self._directory = directory
        self._keep = keep
        self._evaluations = evaluations
        self._stored = stored
        self._damaged: set[str] = set()
        directory.mkdir(parents=True, exist_ok=True)
        for unfinished in directory.glob(".*"):
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()

    def begin(self, aside: Path) -> None:
        """Create the empty directory into which a checkpoint is written."""
        shutil.rmtree(aside, ignore_errors=True)
        if self._stored is not None:
            for name in self._local():  # the store has it: this machine needs space for one checkpoint, not two
                self._remove(name)
        aside.mkdir()

    def add(self, aside: Path, name: str) -> Path:
        """Make the directory written aside the latest checkpoint, and delete those no longer needed.

        Raises:
            OSError: the disk is full or gone; ``latest`` is unchanged.
            ObjectStoreError: an object store refuses, or is out of reach for too long.
        """
        manifest = manifest_of(describe_directory(aside))
        (aside / MANIFEST).write_bytes(manifest)
        sync_tree(aside)
        self._remove(name)  # of a step that is trained again
        final = self._directory / name
        aside.rename(final)
        sync(self._directory)
        if self._stored is None:
            write_latest(self._directory, name)
        else:
            if name in self._stored.names():
                self._stored.remove(name)
            self._stored.upload(name, final, manifest)
            self._stored.point(LATEST, name)
        self._damaged.discard(name)
        self._prune(name)
        return final

    def latest(self) -> Path | None:
        """The verified checkpoint to resume from: the one that ``latest`` names, or the newest intact one if that is
        damaged or gone. None if there is none.

        Raises:
            JackpotError: there are checkpoints, and all of them are damaged; or the disk cannot be read.
            ObjectStoreError: they are in an object store that refuses or is out of reach.
        """
        names, named = self._names(), self._named()
        if named not in names and (named is not None or names):
            said = "is missing" if named is None else f"names {named[:40]!r}, which is not there"
            LOG.warning("%s %s; going on from the newest whole checkpoint", self._where(LATEST), said)
        for name in by_preference(names, named):
            try:
                return self._intact(name)
            except (DirectoryDamagedError, ObjectCorruptError, ObjectMissingError) as error:
                self._damaged.add(name)
                LOG.error("checkpoint %s is damaged, looking for an older one: %s", self._where(name), error)
            except OSError as error:
                raise JackpotError(
                    f"checkpoint {self._where(name)} cannot be read now ({error}); it is retried at the next "
                    "start. If that lasts, delete it to go on from an older one"
                ) from error
        if names:
            raise JackpotError(
                f"all checkpoints in {self._where()} are damaged ({', '.join(names)}); the log has the details. "
                "Bring one back from a backup, or start a new run"
            )
        return None

    @property
    def steps(self) -> Collection[int]:
        """The steps with a checkpoint, finished or in progress.

        Raises:
            ObjectStoreError: they are in an object store that does not answer.
        """
        # The local copies count, too: they exist before their upload is finished.
        here = {path.name.removeprefix(".") for path in self._directory.iterdir()}
        there = self._stored.names() if self._stored is not None else []
        return {int(name) for name in here.union(there) if STEP_NAME.fullmatch(name)}

    def _names(self) -> list[str]:
        """The complete checkpoints, oldest first."""
        local = self._local()
        if self._stored is None:
            return local
        names = [name for name in self._stored.names() if STEP_NAME.fullmatch(name)]
        for name in local:
            if name not in names:  # never finished: no group counts as trained by it
                self._remove(name)
        return names

    def _local(self) -> list[str]:
        return sorted(path.name for path in self._directory.iterdir() if STEP_NAME.fullmatch(path.name))

    def _named(self) -> str | None:
        return read_latest(self._directory) if self._stored is None else self._stored.pointed(LATEST)

    def _where(self, name: str = "") -> str:
        return str(self._directory / name) if self._stored is None else self._stored.where(name)

    def _intact(self, name: str) -> Path:
        """A checkpoint's directory, every file checked by hash."""
        path = self._directory / name
        if self._stored is None:
            check_directory(path)
            return path
        manifest = self._stored.manifest(name)
        if path.is_dir():
            try:
                check_directory(path)
                if (path / MANIFEST).read_bytes() == manifest:
                    return path
                LOG.warning("%s differs from the store's checkpoint; reading it again", path)
            except DirectoryDamagedError as error:
                LOG.warning("%s; reading the checkpoint again", error)
            self._remove(name)
        return self._fetch(self._stored, path, manifest)

    def _fetch(self, stored: ObjectDirectories, final: Path, manifest: bytes) -> Path:
        aside = final.with_name(f".{final.name}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        LOG.info("reading checkpoint %s", stored.where(final.name))
        stored.download(final.name, aside)
        (aside / MANIFEST).write_bytes(manifest)
        sync_tree(aside)
        aside.rename(final)
        return final

    def _remove(self, name: str) -> None:
        """Remove a local directory, if it exists, atomically."""
        aside = self._directory / f".{name}.removed"
        shutil.rmtree(aside, ignore_errors=True)
        try:
            (self._directory / name).rename(aside)
        except FileNotFoundError:
            return
        shutil.rmtree(aside)

    def _prune(self, newest: str) -> None:
        if self._stored is None:
            for name in self._superfluous(self._local(), newest):
                self._remove(name)
            return
        for name in self._local():
            if name != newest:
                self._remove(name)
        try:
            for name in self._superfluous([name for name in self._stored.sweep() if STEP_NAME.fullmatch(name)], newest):
                self._stored.remove(name)
        except ObjectStoreError as error:
            LOG.warning("older checkpoints are kept for now: %s", error)

    def _superfluous(self, names: list[str], newest: str) -> list[str]:
        """The names (ascending) that are no longer needed; never ``newest``, which ``latest`` names."""
        intact = [name for name in names if name not in self._damaged]
        best = best_step(self._evaluations, [int(name) for name in intact]) if self._evaluations else None
        stay = {newest, *intact[-self._keep :]}
        return [name for name in names if name not in stay and int(name) != best]
