"""``metrics.jsonl``: one row per optimizer step, written by the learner alone."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jackpot.telemetry import Metrics


class StepLog:
    """Appends steps to ``metrics.jsonl`` and mirrors them to Prometheus.

    After a restart a step may be written again; readers keep the last row of a step.
    """

    def __init__(self, run_dir: Path, metrics: Metrics) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._resumed_path = run_dir / "resumed.json"
        self._metrics = metrics

    def write(self, rows: Sequence[Mapping[str, float]], num_tokens: int) -> None:
        """Append rows in one write, so that a reader never sees half a line of a crash-free run.

        Args:
            rows: one per optimizer step of a batch.
            num_tokens: completion tokens of the batch.
        """
        self._metrics.tokens_trained_total.inc(num_tokens)
        for row in rows:
            self._metrics.observe_step(row)
        now = time.time()
        text = "".join(json.dumps(_json_numbers({**row, "time": now})) + "\n" for row in rows)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)

    def resumed(self, step: int) -> None:
        """Record that training went on from the checkpoint of ``step``."""
        self._resumed_path.write_text(json.dumps({"resumed_from_step": step, "time": time.time()}), encoding="utf-8")


def _json_numbers(row: Mapping[str, float]) -> dict[str, float | None]:
    # JSON has no NaN; null says "not a number" to every reader.
    return {name: value if math.isfinite(value) else None for name, value in row.items()}
