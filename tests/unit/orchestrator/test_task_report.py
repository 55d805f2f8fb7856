"""What `jackpot validate` prints about prompts and rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jackpot.config import JobSpec, parse_job
from jackpot.orchestrator.preflight import validate_job
from jackpot.orchestrator.task_report import report_task

WRITTEN = tuple({"prompt": f"{n}+{n}=", "answer": f"{n}+{n}={2 * n}\n#### {2 * n}"} for n in range(2, 32))
LATEX = tuple({"prompt": f"{n}/3=", "answer": f"\\frac{{{n}}}{{3}}"} for n in range(4, 34))


def report(job: JobSpec) -> list[str]:
    return report_task(job, validate_job(job))


@pytest.fixture
def job_of(make_model, tmp_path: Path):
    def make(rows: Any, eval_rows: Any = None, **params: Any) -> JobSpec:
        for name, content in (("path", rows), ("eval_path", eval_rows)):
            if content is not None:
                params[name] = str(tmp_path / f"{name}.jsonl")
                Path(params[name]).write_text("".join(json.dumps(row) + "\n" for row in content))
        model = str(make_model())
        task = {"name": "jsonl", "params": params}
        return parse_job({"policy": {"model": model}, "actor": "policy", "task": task, "sampling": {"max_tokens": 64}})

    return make


@pytest.mark.parametrize("rows", [WRITTEN, LATEX], ids=["written", "latex"])
@pytest.mark.parametrize("tag", [None, "answer"])
def test_right_answers_earn_one_plain_and_boxed_and_others_nothing(job_of, rows, tag):
    params = {} if tag is None else {"answer_tag": tag}
    lines = report(job_of(rows, reward="math_verify", **params))
    assert lines == [
        "training prompts         27 of 27 can be used",
        "held-out prompts         3 of 3 are asked",
        "the right answer         1.00 on average, 8 of 8 earn 1",
        "the right answer, boxed  1.00 on average, 8 of 8 earn 1",
        "an empty text            0.00 on average, 0 of 8 earn 1",
        "wrong texts              0.00 on average, 0 of 152 earn 1",  # twelve, and seven answers of other prompts
    ]


def test_exact_match_is_said_to_read_no_boxes(job_of):
    lines = report(job_of(WRITTEN))
    assert lines[3] == "the right answer, boxed  0.00 on average, 0 of 8 earn 1"
    assert lines[-1] == "note: a boxed answer earns nothing; task.params.reward=math_verify reads boxes and phrases"


def test_rows_that_are_left_out_are_counted_and_named(job_of):
    rows = [*WRITTEN[:10], {"prompt": "1+" * 40, "answer": "40"}, {"prompt": "\ud83d", "answer": "1"}]
    held = [
        {"prompt": "7*7=", "answer": "49"},
        {"prompt": "7*7= ", "answer": "49"},
        {"prompt": "2+" * 40, "answer": "1"},
    ]
    lines = report(job_of(rows, held))
    assert lines[0] == "training prompts         10 of 12 can be used"
    assert lines[1].startswith("  left out: the prompt of line 11 has 80 tokens: with sampling.max_tokens = 64 more")
    assert lines[2].startswith("  left out: the prompt of line 12 cannot be encoded")
    assert lines[3] == "held-out prompts         1 of 3 are asked"
    assert {line.split(" of ")[1].split()[1] for line in lines[4:6]} == {"2", "3"} or "line 1" in lines[4] + lines[5]


def test_held_out_prompts_that_are_trained_on_are_counted(job_of, monkeypatch):
    job = job_of(WRITTEN)
    from jackpot.orchestrator.tasks.jsonl import JsonlTask

    monkeypatch.setattr(JsonlTask, "eval_items", lambda self, count: [self.train_prompt(0), self.train_prompt(5)])
    assert "warning: 2 held-out prompts are training prompts, too: the accuracy flatters" in report(job)


def test_training_prompts_that_there_is_no_time_for_are_said_to_be_left_out(job_of, monkeypatch):
    from jackpot.orchestrator import task_report
    from jackpot.orchestrator.tasks.jsonl import JsonlTask

    monkeypatch.setattr(JsonlTask, "eval_items", lambda self, count: [self.train_prompt(0), self.train_prompt(5)])
    monkeypatch.setattr(task_report, "COMPARED_PROMPTS", 3)
    assert "warning: 1 held-out prompts are training prompts (of the first 3), too: the accuracy flatters" in report(
        job_of(WRITTEN)
    )
