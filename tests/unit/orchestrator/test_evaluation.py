"""When evaluations are due, and their log."""

from __future__ import annotations

import json

from jackpot.errors import RewardError
from jackpot.orchestrator.evaluation import EvaluationLog, EvaluationRow, last_due, next_evaluation, pass_at_n


def row(step: int) -> EvaluationRow:
    return EvaluationRow(
        step=step,
        newest_step=step + 1,
        time=0.0,
        policy_accuracy=0.5,
        pass_at_n=0.75,
        mean_reward=0.25,
        num_samples=4,
        num_reward_failures=0,
        mean_tokens=7.0,
        truncated_fraction=0.0,
    )


def test_a_prompt_passes_with_one_right_sample_and_unjudged_ones_do_not_count():
    failed = RewardError("timed out")
    assert pass_at_n([[0.0, 1.0], [0.0, 0.5], [failed, 1.0], [failed, failed]]) == 2 / 3
    assert pass_at_n([[1.0], [0.0], [0.0], [0.0]]) == 0.25  # n = 1: the accuracy


def test_the_last_step_is_always_due():
    due = [0]
    while due[-1] < 25:
        due.append(next_evaluation(due[-1], every=10, steps=25))
    assert due == [0, 10, 20, 25]


def test_after_a_late_sample_the_next_multiple_is_due():
    assert next_evaluation(11, every=10, steps=25) == 20


def test_evaluations_that_training_has_overtaken_are_passed_over():
    assert [last_due(newest, every=10, steps=25) for newest in (10, 19, 24, 25)] == [10, 10, 20, 25]


def test_the_log_is_read_back_after_a_crash_in_the_middle_of_a_line(tmp_path):
    log = EvaluationLog(tmp_path / "evaluations.jsonl")
    assert log.last_step() is None
    log.append(row(0))
    log.append(row(12))
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 2')
    assert log.last_step() == 12
    log.append(row(20))
    steps = [json.loads(line)["step"] for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]
    assert steps == [0, 12, 20]
