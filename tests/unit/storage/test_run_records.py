"""What the files of a run directory hold, written and read back by the same code."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from jackpot.errors import DamagedRecordError
from jackpot.storage.json_files import JsonLinesWriter
from jackpot.storage.run_directory import RunFiles
from jackpot.storage.run_records import (
    ActivityRecord,
    EvaluationRow,
    HeldOutAccuracy,
    StepRows,
    TerminalRecord,
    best_step,
    read_accuracies,
    read_activities,
    read_evaluations,
    read_ledger,
    read_resumption,
    read_steps,
    read_summary,
    write_resumption,
    write_summary,
)


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    return RunFiles(tmp_path)


def evaluation(step: int, accuracy: float) -> EvaluationRow:
    return EvaluationRow(
        step=step,
        newest_step=step,
        time=0.0,
        policy_accuracy=accuracy,
        accuracy_stderr=0.25,
        pass_at_n=accuracy,
        mean_reward=accuracy,
        num_prompts=2,
        num_samples=4,
        num_reward_failures=0,
        num_unreadable=0,
        comparable=True,
        mean_tokens=7.0,
        truncated_fraction=0.0,
    )


def test_of_a_run_that_never_began_there_is_nothing(files: RunFiles) -> None:
    assert read_steps(files) == read_evaluations(files) == read_ledger(files) == []
    assert read_accuracies(files.evaluations) == [] and best_step(files.evaluations, [0]) is None
    assert read_activities(files) == {} and read_resumption(files) is None and read_summary(files) is None


def test_of_a_step_written_twice_the_last_row_counts(files: RunFiles, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"step": 1, "x": 1}, {"step": 2, "x": 2}, {"step": 3, "x": 3}, {"step": 2, "x": 20}]
    lines = [json.dumps(row) for row in rows]
    files.metrics.write_text("\n".join([*lines, '{"step": 3, "x"', '{"x": 4}', "[]", '{"step": 4, "x']))
    assert read_steps(files) == [{"step": 1, "x": 1}, {"step": 2, "x": 20}, {"step": 3, "x": 3}]
    assert f"{files.metrics}, line 5, is damaged" in caplog.text and f"{files.metrics}, line 7," in caplog.text
    assert "line 8" not in caplog.text  # the writer may be in the middle of it


def test_growing_rows_are_read_on(files: RunFiles) -> None:
    writer, rows = JsonLinesWriter(files.metrics), StepRows(files.metrics)
    assert rows.refresh() == []
    writer.append([{"step": 2}, {"step": 1}])
    assert rows.refresh() == [{"step": 1}, {"step": 2}]
    writer.append([{"step": 1, "x": 3}])
    assert rows.refresh() == [{"step": 1, "x": 3}, {"step": 2}]


def test_how_groups_ended_is_read_once_a_group(files: RunFiles, caplog: pytest.LogCaptureFixture) -> None:
    lost, trained = TerminalRecord("a", "dropped", "lost", -1, ""), TerminalRecord("a", "trained", "", 4, "")
    stale = TerminalRecord("b", "dropped", "stale", -1, "2 steps")
    JsonLinesWriter(files.ledger).append(asdict(record) for record in (lost, stale, trained))
    assert read_ledger(files) == [trained, stale]
    JsonLinesWriter(files.ledger).append([{"group_id": "c", "state": "forgotten"}])
    assert read_ledger(files) == [trained, stale]
    assert f"{files.ledger}, line 4, is damaged (state: Input should be 'trained' or 'dropped')" in caplog.text


def test_the_best_step_is_the_newest_of_the_most_accurate_at_hand(files: RunFiles) -> None:
    writer = JsonLinesWriter(files.evaluations)
    writer.append(asdict(evaluation(step, accuracy)) for step, accuracy in [(0, 0.9), (4, 0.5), (8, 0.5), (12, 0.4)])
    with files.evaluations.open("a") as file:
        file.write('{"step": 16, "policy_acc')
    assert read_accuracies(files.evaluations)[1] == HeldOutAccuracy(4, 0.5)
    assert best_step(files.evaluations, [4, 8, 12, 16]) == 8
    assert best_step(files.evaluations, [16]) is None
    writer.append([{"step": 16}])
    with pytest.raises(
        DamagedRecordError, match=r"evaluations\.jsonl, line 5, is damaged \(policy_accuracy: Field req"
    ):
        best_step(files.evaluations, [4])


def test_what_services_did_is_read_back_by_service_and_replica(
    files: RunFiles, caplog: pytest.LogCaptureFixture
) -> None:
    records = {name: ActivityRecord(name, {"work": 1.5}, 2.0) for name in ("learner", "scorer")}
    for record in records.values():
        record.write(files, "0")
    assert read_activities(files) == {"learner-0": records["learner"], "scorer-0": records["scorer"]}
    (files.activities / "scorer-0.json").write_text('{"service": "scorer"}')
    assert list(read_activities(files)) == ["learner-0"]
    assert "activity/scorer-0.json is damaged (seconds: Field required)" in caplog.text


def test_the_learner_says_where_it_went_on(files: RunFiles, caplog: pytest.LogCaptureFixture) -> None:
    write_resumption(files, 3)
    write_resumption(files, 7)
    resumption = read_resumption(files)
    assert resumption is not None and resumption.resumed_from_step == 7
    files.resumed.write_text("{")
    assert read_resumption(files) is None and f"{files.resumed} is damaged" in caplog.text


def test_the_outcome_is_read_back(files: RunFiles, caplog: pytest.LogCaptureFixture) -> None:
    write_summary(files, {"state": "failed", "steps": 3})
    assert read_summary(files) == {"state": "failed", "steps": 3}
    files.summary.write_text("{")
    assert read_summary(files) is None and f"{files.summary} is damaged" in caplog.text
