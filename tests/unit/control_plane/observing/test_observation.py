"""Series, ledger and logs from a job's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jackpot.control_plane.observing.observation import LogTail, downsample, ledger, log_path, series, services
from jackpot.errors import JobNotFoundError


def write_rows(path: Path, *rows: dict[str, object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_downsampling_averages_equal_stretches_and_keeps_the_last_point() -> None:
    points = [(float(x), float(x * 10)) for x in range(1, 8)]
    assert downsample(points, 100) == {"x": [1, 2, 3, 4, 5, 6, 7], "y": [10, 20, 30, 40, 50, 60, 70]}
    assert downsample(points, 2) == {"x": [4, 7], "y": [25, 60]}
    assert downsample(points, 1) == {"x": [7], "y": [40]}
    assert downsample([], 5) == {"x": [], "y": []}
    assert downsample([(1.0, float("nan")), (2.0, 4.0), (3.0, None)], 1) == {"x": [3], "y": [4]}
    assert downsample([(1.0, float("inf"))], 5) == {"x": [1], "y": [None]}


def test_of_a_step_written_twice_the_last_counts_and_half_lines_wait(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "metrics.jsonl", {"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}, {"step": 2, "a": 3.0, "b": 9.0}
    )
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "a"')
    write_rows(tmp_path / "evaluations.jsonl", {"step": 0, "policy_accuracy": 0.5})
    write_rows(tmp_path / "telemetry.jsonl", {"time": 100.0, "bus/x": 1}, {"time": 101.5, "bus/x": 2})
    curves = series(tmp_path, (), 10)
    assert curves["a"] == {"x": [1, 2], "y": [1, 3]} and curves["b"] == {"x": [2], "y": [9]}
    assert curves["evaluation/policy_accuracy"] == {"x": [0], "y": [0.5]}
    assert curves["bus/x"] == {"x": [0, 1.5], "y": [1, 2]}
    assert set(series(tmp_path, {"b"}, 10)) == {"b"}
    assert series(tmp_path / "nothing", (), 10) == {}


def test_the_ledger_counts_each_group_once(tmp_path: Path) -> None:
    trained = {"group_id": "a", "state": "trained", "reason": "", "step": 3, "detail": ""}
    dropped = {"group_id": "b", "state": "dropped", "reason": "stale", "step": -1, "detail": ""}
    write_rows(tmp_path / "ledger.jsonl", trained, dropped, trained)
    running = ledger(tmp_path, None, 1)
    assert (running["trained"], running["dropped"], running["ended"]) == (1, {"stale": 1}, 2)
    assert running["dispatched"] is None and running["open"] is None and len(running["entries"]) == 1
    write_rows(tmp_path / "telemetry.jsonl", {"ledger/dispatched": 5, "ledger/open": 3}, {"step": 1})
    looked = ledger(tmp_path, None, 0)
    assert (looked["dispatched"], looked["open"]) == (5, 3)
    over = ledger(tmp_path, {"ledger": {"dispatched": 3, "open": 1}}, 0)
    assert (over["dispatched"], over["open"], over["entries"]) == (3, 1, [])


def test_logs_come_from_their_last_lines_on_without_passwords(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "learner.log"
    log.write_text("one\ntwo\nredis://u:secret@host\nhalf")
    assert services(tmp_path) == ["learner"] and log_path(tmp_path, "learner") == log
    with pytest.raises(JobNotFoundError, match="learner"):
        log_path(tmp_path, "../learner")
    tail = LogTail(log, 2)
    assert tail.read() == "two\nredis://u:***@host\n"
    with log.open("a") as file:
        file.write(" line\n")
    assert tail.read() == "half line\n" and tail.read() == ""
    assert LogTail(log, 0).read() == ""
    assert LogTail(log, 100).read().startswith("one\n")
