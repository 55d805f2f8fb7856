"""Write-ahead manifests: the groups that each batch trains on, on disk before the first gradient.

Together with the checkpoints they are the system of record of training. After a crash each batch beyond the last
checkpoint is trained again from its manifest, on the same groups.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from jackpot.storage.durable_files import replace_synced, sync
from jackpot.storage.json_files import read_record


@dataclass(frozen=True, slots=True)
class Manifest:
    """One batch: its number, the optimizer step it starts at, and its groups in slot order."""

    batch: int
    start_step: int
    group_ids: tuple[str, ...]


class ManifestLog:
    """The manifests of one job, a file per batch. The learner writes them, the orchestrator reads them.

    Args:
        directory: in the run directory; created with the first manifest.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, manifest: Manifest) -> None:
        """Store a manifest durably: written aside, synced, renamed."""
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._path(manifest.batch)
        replace_synced(path, json.dumps(asdict(manifest)), path.with_suffix(".tmp"))

    def read(self, batch: int) -> Manifest | None:
        """The manifest of a batch, or None if that batch never began.

        Raises:
            DamagedRecordError: the file is there but cannot be read.
        """
        return _read_if_there(self._path(batch))

    def all(self) -> list[Manifest]:
        """All manifests, without any that is discarded meanwhile.

        Raises:
            DamagedRecordError: as :meth:`read`.
        """
        return [manifest for path in self._paths() if (manifest := _read_if_there(path)) is not None]

    def between(self, first: int, last: int) -> list[Manifest]:
        """The manifests of batches ``first`` … ``last`` − 1; gaps are left out.

        Raises:
            DamagedRecordError: as :meth:`read`.
        """
        return [manifest for batch in range(first, last) if (manifest := self.read(batch)) is not None]

    def discard_from(self, batch: int) -> None:
        """Delete the manifests from ``batch`` on: they can no longer be trained as written."""
        discarded = [path for path in self._paths() if int(path.stem) >= batch]
        for path in discarded:
            path.unlink()
        if discarded:
            sync(self._directory)

    def _paths(self) -> list[Path]:
        return sorted(self._directory.glob("*.json"))

    def _path(self, batch: int) -> Path:
        return self._directory / f"{batch:08d}.json"


def _read_if_there(path: Path) -> Manifest | None:
    try:
        return read_record(path, Manifest)
    except FileNotFoundError:
        return None
