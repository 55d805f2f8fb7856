"""What a grader makes of golds and completions of every kind; each row of the file is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jackpot.orchestrator.tasks.answers import boxed_answer, plain_punctuation, stated_answers
from jackpot.orchestrator.tasks.mathematics import math_verify

CASES = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "data" / "verifier_cases.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['gold']} | {case['completion'][:40]}")
def test_a_completion_is_worth_what_its_answer_is(case):
    assert math_verify(case["gold"], case["completion"]) == case["expected"]


@pytest.mark.parametrize("case", [case for case in CASES if case["expected"]], ids=lambda case: case["gold"])
def test_every_gold_is_its_own_answer_plain_boxed_and_stated(case):
    gold = case["gold"]
    for completion in (gold, f"$\\boxed{{{gold}}}$", f"The answer is ${gold}$.", f"答案：{gold}", f"so\n#### {gold}"):
        assert math_verify(gold, completion) == 1.0, completion


@pytest.mark.parametrize(
    "completion", [r"\boxed{8^{8^{8^8}}}", r"\boxed{(x+2)^{4000}}", r"\boxed{900000000!}", "2^(3^(4^5))", "170!!!"]
)
def test_what_nobody_can_write_out_is_refused_at_once(completion):
    """A comparison that began would end the test by its time limit."""
    assert math_verify("12", completion) == 0.0


def test_a_blank_answer_can_match_nothing():
    with pytest.raises(ValueError, match="the answer is blank"):
        math_verify(" ", "3")


def test_the_last_box_counts_and_boxes_side_by_side_are_one_answer():
    assert boxed_answer("none") is None
    assert boxed_answer(r"\boxed{1} no, wait: it is rather \boxed{2}") == "2"
    assert boxed_answer(r"\boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert boxed_answer(r"\boxed{\boxed{3}}") == "3"
    assert boxed_answer(r"\boxed{1} and \boxed{2}") == "1,2"
    assert boxed_answer(r"\boxed{1}, \fbox{1}") == "1"
    assert boxed_answer(r"first \boxed{1}, then \boxed{2") == ""  # cut short: nobody knows


def test_an_answer_is_stated_by_a_box_else_a_mark_else_a_phrase():
    assert stated_answers(r"The answer is 3. \boxed{4}") == ["4"]
    assert stated_answers("The answer is 3.\n#### 5") == ["5"]
    assert stated_answers("The answer is 3.5. I hope so.") == ["3.5. I hope so", "3.5"]
    assert stated_answers("**Answer:** 7") == ["7"]
    assert stated_answers(plain_punctuation("答案是：（Ｃ）。")) == ["(C)"]
    assert stated_answers("2 + 2 = 4") == ["2 + 2 = 4", "4"]
    assert stated_answers("") == []
