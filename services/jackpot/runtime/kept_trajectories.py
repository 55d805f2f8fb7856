"""The scored groups of the last batches, kept in the run directory to be looked at again. numpy only.

A directory per batch, a file per group, in the bus's own format.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from jackpot.runtime.codec import decode_scored, encode_scored
from jackpot.trajectory import ScoredGroup


class KeptTrajectories:
    """``trajectories/`` of a run directory.

    Args:
        run_dir: the run directory.
        max_group_bytes: the largest group accepted, after decompression.
    """

    def __init__(self, run_dir: Path, max_group_bytes: int) -> None:
        self._directory = run_dir / "trajectories"
        self._max_group_bytes = max_group_bytes

    def write(self, batch: int, groups: Sequence[ScoredGroup], keep: int) -> None:
        """Keep a batch, written aside and renamed, and delete all but the newest ``keep``; 0 keeps none.

        Raises:
            OSError: the disk is full or gone.
        """
        if keep == 0:
            return
        final = self._directory / f"{batch:08d}"
        aside = self._directory / f".{batch:08d}.{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for place, group in enumerate(groups):
            data = encode_scored(group, compress=True, max_bytes=self._max_group_bytes)
            (aside / f"{place:06d}").write_bytes(data)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in self.batches()[:-keep]:
            shutil.rmtree(self._directory / f"{old:08d}")

    def batches(self) -> list[int]:
        """The numbers of the batches that are there, in order."""
        if not self._directory.is_dir():
            return []
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdigit())

    def read(self, batch: int) -> list[ScoredGroup]:
        """The groups of a batch, in their order in the batch.

        Raises:
            FileNotFoundError: the batch is not there.
            PayloadError: one of its files is damaged.
        """
        files = sorted((self._directory / f"{batch:08d}").iterdir())
        return [decode_scored(path.read_bytes(), max_bytes=self._max_group_bytes) for path in files]
