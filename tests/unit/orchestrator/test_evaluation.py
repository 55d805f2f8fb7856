"""When evaluations are due, and their log."""

from __future__ import annotations

import json
import math

import pytest

from jackpot.orchestrator.evaluation import (
    EvaluationLog,
    EvaluationRow,
    accuracy_stderr,
    last_due,
    next_evaluation,
    pass_at_n,
)


def row(step: int) -> EvaluationRow:
    return EvaluationRow(
        step=step,
        newest_step=step + 1,
        time=0.0,
        policy_accuracy=0.5,
        accuracy_stderr=0.25,
        pass_at_n=0.75,
        mean_reward=0.25,
        num_prompts=4,
        num_samples=4,
        num_reward_failures=0,
        num_unreadable=0,
        comparable=True,
        mean_tokens=7.0,
        truncated_fraction=0.0,
    )


def test_a_prompt_passes_with_one_right_sample_and_those_without_rewards_do_not_count():
    assert pass_at_n([[0.0, 1.0], [0.0, 0.5], [1.0], []]) == 2 / 3
    assert pass_at_n([[1.0], [0.0], [0.0], [0.0]]) == 0.25  # n = 1: the accuracy


def test_the_standard_error_is_that_of_a_mean_over_prompts():
    single = [[1.0]] * 30 + [[0.0]] * 70
    assert accuracy_stderr(single) == pytest.approx(math.sqrt(0.3 * 0.7 / 99), rel=1e-12)
    # Samples that only repeat each other add no certainty; the binomial formula would halve the error.
    assert accuracy_stderr([prompt * 4 for prompt in single]) == pytest.approx(accuracy_stderr(single), rel=1e-12)
    unequal = [[1.0, 0.0], [1.0], [], [0.2, 0.0, 1.0]]  # right: 1 of 2, 1 of 1, 1 of 3; accuracy 1/2
    assert accuracy_stderr(unequal) == pytest.approx(math.sqrt(3 / 2 * (0 + 0.5**2 + 0.5**2)) / 6, rel=1e-12)
    assert accuracy_stderr([[1.0, 0.0, 1.0]]) is None


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
