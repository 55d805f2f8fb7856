"""Write-ahead manifests: which groups each batch trains on, on disk before the first gradient.

Together with the checkpoints they are the system of record of what was trained: after a crash a batch beyond the
last checkpoint is trained again from its manifest, on the same groups.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from jackpot.errors import JackpotError
from jackpot.storage.durable_files import replace_synced, sync


@dataclass(frozen=True, slots=True)
class Manifest:
    """One batch: its number, the optimizer step it starts at, and its groups in slot order."""

    batch: int
    start_step: int
    group_ids: tuple[str, ...]


class ManifestLog:
    """The manifests of one job, a file per batch.

    Args:
        directory: ``manifests/`` of the run directory; created if missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def write(self, manifest: Manifest) -> None:
        """Store a manifest durably: written aside, synced, renamed."""
        path = self._path(manifest.batch)
        replace_synced(path, json.dumps(asdict(manifest)), path.with_suffix(".tmp"))

    def read(self, batch: int) -> Manifest | None:
        """The manifest of a batch, or None if that batch never began.

        Raises:
            JackpotError: the file is there but cannot be read.
        """
        path = self._path(batch)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return Manifest(data["batch"], data["start_step"], tuple(data["group_ids"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise JackpotError(f"{path} is damaged ({error}); restore it or start a new run") from None

    def between(self, first: int, last: int) -> list[Manifest]:
        """The manifests of batches ``first`` … ``last`` − 1; gaps are left out."""
        return [manifest for batch in range(first, last) if (manifest := self.read(batch)) is not None]

    def discard_from(self, batch: int) -> None:
        """Forget batch ``batch`` and all later ones: they can no longer be trained as written."""
        for path in self._directory.glob("*.json"):
            if int(path.stem) >= batch:
                path.unlink()
        sync(self._directory)

    def _path(self, batch: int) -> Path:
        return self._directory / f"{batch:08d}.json"
