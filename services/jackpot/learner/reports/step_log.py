"""``metrics.jsonl``: one row per optimizer step, written only by the learner."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jackpot.storage.json_files import JsonLinesWriter
from jackpot.storage.run_directory import RunFiles
from jackpot.storage.run_records import write_resumption
from jackpot.telemetry import Metrics


class StepLog:
    """Appends steps to ``metrics.jsonl`` and mirrors them to Prometheus.

    After a restart a step may be written again; readers keep the last row of a step.
    """

    def __init__(self, run_dir: Path, metrics: Metrics) -> None:
        self._files = RunFiles(run_dir)
        self._writer = JsonLinesWriter(self._files.metrics)
        self._metrics = metrics

    def write(self, rows: Sequence[Mapping[str, float]], num_tokens: int) -> None:
        """Append rows in one write, so that a reader never sees an incomplete line unless the learner crashed.

        Args:
            rows: one per optimizer step of a batch.
            num_tokens: completion tokens of the batch.
        """
        self._metrics.tokens_trained_total.inc(num_tokens)
        for row in rows:
            self._metrics.observe_step(row)
        now = time.time()
        self._writer.append(_json_numbers({**row, "time": now}) for row in rows)

    def resumed(self, step: int) -> None:
        """Record that training resumed from the checkpoint of ``step``."""
        write_resumption(self._files, step)


def _json_numbers(row: Mapping[str, float]) -> dict[str, float | None]:
    # JSON has no NaN; null says "not a number" to every reader.
    return {name: value if math.isfinite(value) else None for name, value in row.items()}
