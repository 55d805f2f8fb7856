"""The scored groups of the last batches, kept in the run directory for later inspection. numpy only.

One file per batch: its groups in the bus's format, each preceded by its size in bytes (8 bytes, little-endian).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from jackpot.bus.payload_format import decode_scored, encode_scored
from jackpot.errors import PayloadError
from jackpot.storage.run_directory import RunFiles
from jackpot.trajectory import ScoredGroup

_SIZE = struct.Struct("<Q")


class KeptTrajectories:
    """``trajectories/`` of a run directory.

    Args:
        run_dir: the run directory.
        max_group_bytes: the largest group accepted, after decompression.
    """

    def __init__(self, run_dir: Path, max_group_bytes: int) -> None:
        self._directory = RunFiles(run_dir).trajectories
        self._max_group_bytes = max_group_bytes

    def write(self, batch: int, groups: Sequence[ScoredGroup], keep: int) -> None:
        """Store a batch and delete all but the newest ``keep``; 0 keeps none. The file is written aside and renamed.

        Raises:
            OSError: the disk is full or missing.
        """
        if keep == 0:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        aside = self._directory / f".{batch:08d}"  # the same name when the batch is trained again after a crash
        with aside.open("wb") as file:
            for group in groups:
                data = encode_scored(group, compress=True, max_bytes=self._max_group_bytes)
                file.write(_SIZE.pack(len(data)))
                file.write(data)
        aside.replace(self._directory / f"{batch:08d}")
        for old in self.batches()[:-keep]:
            (self._directory / f"{old:08d}").unlink()

    def batches(self) -> list[int]:
        """The numbers of the stored batches, in order."""
        if not self._directory.is_dir():
            return []
        return sorted(int(name) for name in os.listdir(self._directory) if name.isdigit())

    def read(self, batch: int) -> list[ScoredGroup]:
        """The groups of a batch, in the batch's order.

        Raises:
            FileNotFoundError: the batch is not stored.
            PayloadError: the file is damaged.
        """
        return list(self._read(self._directory / f"{batch:08d}"))

    def _read(self, path: Path) -> Iterator[ScoredGroup]:
        with path.open("rb") as file:
            while head := file.read(_SIZE.size):
                size = _SIZE.unpack(head)[0] if len(head) == _SIZE.size else 0
                if not 0 < size <= os.fstat(file.fileno()).st_size:
                    raise PayloadError(f"{path} is truncated or damaged. Delete it; other batches can still be read.")
                yield decode_scored(file.read(size), max_bytes=self._max_group_bytes)
