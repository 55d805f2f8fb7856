"""Reads a growing file of JSON lines from where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

from jackpot.control_plane.run_directory import Row

MAX_READ_BYTES = 4 << 20


class JsonlTail:
    """The rows of a file, each once. A half line at the end waits for its rest.

    Args:
        path: of the file; it need not exist yet.
        offset: where to begin, in bytes; one that :attr:`offset` has told.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self._path = path
        self.offset = offset

    def read(self, max_bytes: int = MAX_READ_BYTES) -> list[tuple[Row, int]]:
        """The new rows, each with the offset behind it; at most ``max_bytes`` at once."""
        try:
            with self._path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(max_bytes)
        except FileNotFoundError:
            return []
        rows = []
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            self.offset += len(line)
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the half line of a process killed while writing
            if isinstance(row, dict):
                rows.append((row, self.offset))
        return rows

    def rows(self) -> list[Row]:
        """All new rows, however many."""
        rows: list[Row] = []
        while more := self.read():
            rows += (row for row, _ in more)
        return rows


class StepRows:
    """The rows of a growing file with a ``step`` column, by step; of a step written twice the last.

    Args:
        path: of the file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._tail = JsonlTail(path)
        self._rows: dict[int, Row] = {}

    def refresh(self) -> list[Row]:
        """All rows so far, in the order of their steps; reads only what is new."""
        for row in self._tail.rows():
            if isinstance(row.get("step"), int):
                self._rows[row["step"]] = row
        return [self._rows[step] for step in sorted(self._rows)]
