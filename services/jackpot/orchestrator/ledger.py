"""The job's ledger on disk: one line per ended group, appended and synced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from jackpot.orchestrator.slots import TerminalState
from jackpot.storage.json_files import JsonLinesReader, JsonLinesWriter
from jackpot.storage.run_records import TerminalRecord
from jackpot.trajectory import GroupKey


class LedgerFile:
    """``ledger.jsonl``: every group once, even if its end is reported twice. One writer.

    Only a group that was declared lost but was trained after all gets a second row; the last row counts.

    Args:
        path: the file; created with its first row. Writing that row also removes a last line that a crash truncated.

    Raises:
        DamagedRecordError: a complete line cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._writer = JsonLinesWriter(path, durable=True)
        self._rows: dict[str, TerminalRecord] = {}
        for record in JsonLinesReader(path, strict=True).records(TerminalRecord):
            self._rows[record.group_id] = record

    @property
    def ended(self) -> Mapping[GroupKey, tuple[TerminalState, str]]:
        """State and reason of every group in the file, in the file's order."""
        return {GroupKey.parse(row.group_id): (row.state, row.reason) for row in self._rows.values()}

    def __contains__(self, group_id: str) -> bool:
        return group_id in self._rows

    def append(self, rows: Iterable[TerminalRecord]) -> list[TerminalRecord]:
        """Add rows durably.

        Returns:
            The rows that were new.
        """
        fresh = list({row.group_id: row for row in rows if self._is_news(row)}.values())
        if fresh:
            self._writer.append(asdict(row) for row in fresh)
            self._rows.update((row.group_id, row) for row in fresh)
        return fresh

    def _is_news(self, row: TerminalRecord) -> bool:
        known = self._rows.get(row.group_id)
        return known is None or (known.reason == "lost" and row.state == "trained")
