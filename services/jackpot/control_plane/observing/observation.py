"""Reads a job's files for its followers: series, ledger, checkpoints, samples, logs."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from jackpot.errors import JobNotFoundError
from jackpot.storage.json_files import JsonLinesReader, Row
from jackpot.storage.run_directory import RunFiles
from jackpot.storage.run_records import read_evaluations, read_ledger, read_steps
from jackpot.telemetry.logs import redact_url

SERVICE_PATTERN = r"^[a-z]+(-[0-9]{1,4})?$"
MAX_LOG_BYTES = 1 << 20

_EVALUATION_COLUMNS = ("policy_accuracy", "accuracy_stderr", "pass_at_n", "mean_tokens", "truncated_fraction")
_SERVICE = re.compile(SERVICE_PATTERN)


def series(run_dir: Path, names: Collection[str], max_points: int) -> dict[str, dict[str, list[float | None]]]:
    """Columns of the job's files as series over steps (telemetry: over time since its first row).

    A column of more than ``max_points`` values is averaged over stretches of equal length.

    Args:
        run_dir: the run directory.
        names: columns wanted; empty means all.
        max_points: most points of one series.

    Returns:
        By column: ``x`` and ``y`` of equal length; ``y`` is None where there is no finite value.
    """
    files = RunFiles(run_dir)
    steps = read_steps(files)
    evaluations = [
        {"step": row["step"], **{f"evaluation/{name}": row.get(name) for name in _EVALUATION_COLUMNS}}
        for row in read_evaluations(files)
    ]
    telemetry = JsonLinesReader(files.telemetry).rows()
    started = telemetry[0].get("time", 0.0) if telemetry else 0.0
    curves: dict[str, dict[str, list[float | None]]] = {}
    for rows, axis, offset in ((steps, "step", 0.0), (evaluations, "step", 0.0), (telemetry, "time", started)):
        columns = dict.fromkeys(name for row in rows for name in row if name not in ("step", "time"))
        for name in columns:
            if names and name not in names:
                continue
            points = [(float(row[axis]) - offset, row[name]) for row in rows if name in row and axis in row]
            curves[name] = downsample(points, max_points)
    return curves


def downsample(points: Sequence[tuple[float, Any]], max_points: int) -> dict[str, list[float | None]]:
    """At most ``max_points`` points: means over stretches of as many points each; the last point's x is kept."""
    bounds = (
        [round(index * len(points) / min(max_points, len(points))) for index in range(min(max_points, len(points)) + 1)]
        if points
        else []
    )
    xs: list[float | None] = []
    ys: list[float | None] = []
    for start, end in pairwise(bounds):
        values = [value for _, value in points[start:end] if isinstance(value, int | float) and math.isfinite(value)]
        xs.append(points[end - 1][0])
        ys.append(sum(values) / len(values) if values else None)
    return {"x": xs, "y": ys}


def ledger(run_dir: Path, summary: Row | None, count: int) -> dict[str, Any]:
    """How the job's groups ended: counts, and the newest ``count`` entries.

    ``dispatched`` and ``open`` come from the bus's own counters, read once a second while a session runs and at its
    end; null before the first reading.
    """
    records = read_ledger(RunFiles(run_dir))
    trained = sum(record.state == "trained" for record in records)
    dropped: dict[str, int] = {}
    for record in records:
        if record.state != "trained":
            dropped[record.reason] = dropped.get(record.reason, 0) + 1
    counters = (summary or {}).get("ledger") or _last_look(run_dir)
    return {
        "trained": trained,
        "dropped": dropped,
        "ended": len(records),
        "dispatched": counters.get("dispatched"),
        "open": counters.get("open", 0) if counters else None,
        "entries": [asdict(record) for record in records[-count:][::-1]] if count else [],
    }


def _last_look(run_dir: Path) -> Row:
    """The ledger's counters in the newest row of telemetry that has them."""
    for row in reversed(JsonLinesReader(RunFiles(run_dir).telemetry).rows()):
        if "ledger/dispatched" in row:
            return {"dispatched": row["ledger/dispatched"], "open": row["ledger/open"]}
    return {}


def samples(run_dir: Path, count: int) -> list[Row]:
    """The newest sample trajectories, newest first."""
    return JsonLinesReader(RunFiles(run_dir).samples).rows()[-count:][::-1]


def services(run_dir: Path) -> list[str]:
    """The processes that have a log."""
    return sorted(path.stem for path in RunFiles(run_dir).logs.glob("*.log") if _SERVICE.fullmatch(path.stem))


def log_path(run_dir: Path, service: str) -> Path:
    """The log of a process.

    Raises:
        JobNotFoundError: there is none of that name; the message lists those that exist.
    """
    known = services(run_dir)
    if service not in known:
        raise JobNotFoundError(f"there is no log of {service[:40]!r}; there are: {', '.join(known) or 'none yet'}")
    return RunFiles(run_dir).log(service)


class LogTail:
    """New lines of a log, secrets redacted.

    Args:
        path: of the log.
        lines: how many of its last lines come first.
    """

    def __init__(self, path: Path, lines: int) -> None:
        self._path = path
        self._offset = _offset_of_last(path, lines)

    def read(self) -> str:
        """The complete lines written since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(MAX_LOG_BYTES)
        except FileNotFoundError:
            return ""
        whole = data[: data.rfind(b"\n") + 1] or (data if len(data) == MAX_LOG_BYTES else b"")
        self._offset += len(whole)
        return redact_url(whole.decode("utf-8", errors="replace"))


def _offset_of_last(path: Path, lines: int) -> int:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            start = max(0, size - MAX_LOG_BYTES)
            file.seek(start)
            data = file.read(size - start)
    except FileNotFoundError:
        return 0
    position = len(data)
    for _ in range(lines + 1):
        position = data.rfind(b"\n", 0, position)
        if position < 0:
            return start
    return start + position + 1
