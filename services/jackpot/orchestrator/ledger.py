"""The job's ledger outside Redis: one line per group that ended, appended and synced."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from jackpot.bus import TerminalRecord
from jackpot.errors import JackpotError
from jackpot.orchestrator.slots import TerminalState
from jackpot.trajectory import GroupKey


class LedgerFile:
    """``ledger.jsonl``: every group once, whatever is told twice. One writer.

    Only a group that was declared lost and turns out to be trained after all gets a second row; the last row counts.

    Args:
        path: the file; created with its first row. A last line that a crash cut short is removed.

    Raises:
        JackpotError: a line in the middle cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, TerminalRecord] = {}
        if path.exists():
            self._load()

    @property
    def ended(self) -> Mapping[GroupKey, tuple[TerminalState, str]]:
        """Every group of the file: its state and reason, in the order of the file."""
        return {GroupKey.parse(row.group_id): (row.state, row.reason) for row in self._rows.values()}

    def __contains__(self, group_id: str) -> bool:
        return group_id in self._rows

    def append(self, rows: Iterable[TerminalRecord]) -> list[TerminalRecord]:
        """Add rows durably.

        Returns:
            Those that were new.
        """
        fresh = list({row.group_id: row for row in rows if self._is_news(row)}.values())
        if fresh:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(asdict(row)) + "\n" for row in fresh)
                file.flush()
                os.fsync(file.fileno())
            self._rows.update((row.group_id, row) for row in fresh)
        return fresh

    def _is_news(self, row: TerminalRecord) -> bool:
        known = self._rows.get(row.group_id)
        return known is None or (known.reason == "lost" and row.state == "trained")

    def _load(self) -> None:
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self._path, whole)
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                row = TerminalRecord(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise JackpotError(
                    f"{self._path}, line {number}, is damaged ({error}); restore it or start a new run"
                ) from None
            self._rows[row.group_id] = row
