"""Tasks: what they ask, what they hold out, what they reward, and what they refuse before anything starts."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from jackpot.config import TaskConfig
from jackpot.errors import ConfigError
from jackpot.orchestrator.tasks import TaskItem, build_task, validate_task
from jackpot.orchestrator.tasks.answers import exact_match, final_answer, math_verify, tagged_answer


def config(name: str, **params: object) -> TaskConfig:
    return TaskConfig(name=name, params=params, reward_timeout_seconds=0.5)


def train_items(task):
    return [task.train_prompt(index) for index in range(task.num_prompts)]


def write_rows(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Doubling:
    """A task as a user would write it."""

    def __init__(self, params, seed):
        if "broken" in params:
            raise ValueError("broken is not supported")
        self.verdict = params.get("verdict", "right")
        self.num_prompts = params.get("prompts", 3)

    def train_prompt(self, index):
        return TaskItem(f"double {index}", {"answer": str(2 * index)})

    def eval_items(self, count):
        return [TaskItem("double 100", {"answer": "200"})]

    def reward(self, item, completion):
        if self.verdict == "raises":
            raise RuntimeError("no network")
        if self.verdict == "hangs":
            time.sleep(5)
        if self.verdict == "nan":
            return float("nan")
        if self.verdict == "text":
            return "1.0"
        if self.verdict == "huge":
            return -1e300
        return float(completion == item.metadata["answer"])


not_callable = 3
not_a_task = dict


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "doubling_module", sys.modules[__name__])


def test_an_entry_point_task_by_its_plain_name():
    task = build_task(config("complement"), seed=1)
    item = task.train_prompt(0)
    assert task.reward(item, item.metadata["answer"]) == 1.0
    assert task.reward(item, "nothing") == 0.0


def test_a_python_task():
    task = validate_task(config("python:doubling_module:Doubling"), seed=1)
    assert task.train_prompt(2).prompt == "double 2"
    assert task.reward(task.train_prompt(2), "4") == 1.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("complemnt", "unknown task. Did you mean 'complement'?"),
        ("jsonn", "Did you mean 'jsonl'?"),
        ("zzzzz", "Known: complement, jsonl, reasoning_gym:<dataset>, python:<module>:<attribute>."),
        ("python:doubling_module", "is not of the form python:<module>:<attribute>"),
        ("python:no_such_module:Task", "No module named 'no_such_module'"),
        ("python:doubling_module:Tripling", "cannot be imported"),
        ("python:doubling_module:not_callable", "not_callable is not callable"),
        ("python:doubling_module:not_a_task", "refused by python:doubling_module:not_a_task"),
    ],
)
def test_unknown_tasks_are_named_with_a_remedy(name, message):
    with pytest.raises(ConfigError) as caught:
        validate_task(config(name), seed=1)
    assert caught.value.field in ("task.name", "task.params")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        ("raises", "its reward fails on the completion '' (RuntimeError: no network)"),
        ("hangs", "no answer within 0.5 s"),
        ("nan", "the reward is nan, not a finite number"),
        ("text", "the reward is '1.0', not a finite number"),
        ("huge", "the reward is -1e+300, beyond ±1e+06"),
    ],
)
def test_a_reward_that_cannot_work_is_found_before_the_job_starts(verdict, message):
    with pytest.raises(ConfigError) as caught:
        validate_task(config("python:doubling_module:Doubling", verdict=verdict), seed=1)
    assert message in str(caught.value)


def test_an_empty_task_and_refused_params():
    with pytest.raises(ConfigError, match="has no prompts to train on"):
        validate_task(config("python:doubling_module:Doubling", prompts=0), seed=1)
    with pytest.raises(ConfigError, match="broken is not supported"):
        validate_task(config("python:doubling_module:Doubling", broken=1), seed=1)


class TestJsonl:
    ROWS = tuple({"prompt": f"{n} + 1 =", "answer": n + 1} for n in range(20))

    def test_a_fraction_is_held_out_by_prompt_and_by_seed(self, tmp_path):
        path = write_rows(tmp_path / "data.jsonl", [*self.ROWS, *self.ROWS])  # every prompt twice
        task = validate_task(config("jsonl", path=path, eval_fraction=0.25), seed=5)
        trained = {item.prompt for item in train_items(task)}
        held_out = {item.prompt for item in task.eval_items(100)}
        assert (task.num_prompts, len(trained), len(task.eval_items(100)), len(held_out)) == (30, 15, 5, 5)
        assert not trained & held_out
        again = build_task(config("jsonl", path=path, eval_fraction=0.25), seed=5)
        other = build_task(config("jsonl", path=path, eval_fraction=0.25), seed=6)
        assert [i.prompt for i in again.eval_items(100)] == [i.prompt for i in task.eval_items(100)]
        assert {i.prompt for i in other.eval_items(100)} != held_out

    def test_an_evaluation_file_is_never_trained_on(self, tmp_path):
        path = write_rows(tmp_path / "data.jsonl", list(self.ROWS))
        eval_path = write_rows(tmp_path / "eval.jsonl", list(self.ROWS[:4]))
        task = validate_task(config("jsonl", path=path, eval_path=eval_path), seed=0)
        assert task.num_prompts == 16
        assert sorted(item.prompt for item in task.eval_items(100)) == [row["prompt"] for row in self.ROWS[:4]]

    def test_chats_other_keys_and_tags(self, tmp_path):
        chat = [{"role": "user", "content": "2 + 2?"}]
        rows = [{"q": chat, "a": "work\n#### 4"}, {"q": "3 + 3?", "a": "6"}]
        path = write_rows(tmp_path / "data.jsonl", rows)
        task = validate_task(
            config("jsonl", path=path, prompt_key="q", answer_key="a", answer_tag="answer", eval_fraction=0.5), seed=0
        )
        (item,) = [i for i in (*train_items(task), *task.eval_items(100)) if i.prompt == chat]
        assert task.reward(item, "<answer>5</answer> no, <answer> 4 </answer>") == 1.0
        assert task.reward(item, "4") == 0.0

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "holds no prompts"),
            ('{"prompt": "a", "answer": "b"}\n{"prompt": \n', "line 2 is not JSON"),
            ("[1]\n", "line 1 is not a JSON object"),
            ('{"question": "a", "answer": "b"}\n', "line 1 has no 'prompt'. It has 'answer', 'question'"),
            ('{"promt": "a", "answer": "b"}\n', "line 1 has no 'prompt'. It has 'promt'"),
            ('\n{"prompt": 3, "answer": "b"}\n', "line 2: the prompt is neither a string nor a list"),
            ('{"prompt": [{"role": "user"}], "answer": "b"}\n', "neither a string nor a list of chat messages"),
            ('{"prompt": "a", "answer": "b"}\n', "no prompt left to train on"),
        ],
    )
    def test_unreadable_files_are_refused_by_line(self, tmp_path, content, message):
        path = tmp_path / "data.jsonl"
        path.write_text(content)
        with pytest.raises(ConfigError) as caught:
            validate_task(config("jsonl", path=str(path)), seed=0)
        assert message in str(caught.value)
        assert (caught.value.field, caught.value.value) == ("task.params.path", str(path))

    @pytest.mark.parametrize(
        ("params", "field", "message"),
        [
            ({}, "task.params.path", "is required"),
            ({"path": "/nowhere.jsonl"}, "task.params.path", "No such file"),
            ({"path": 3}, "task.params.path", "is not a string"),
            ({"path": "x", "rewards": "exact_match"}, "task.params.rewards", "Did you mean 'reward'?"),
            ({"path": "x", "reward": "exact"}, "task.params.reward", "Use one of exact_match, math_verify."),
        ],
    )
    def test_bad_parameters_are_named(self, params, field, message):
        with pytest.raises(ConfigError) as caught:
            validate_task(config("jsonl", **params), seed=0)
        assert caught.value.field == field
        assert message in str(caught.value)


def test_without_reasoning_gym_its_tasks_say_what_to_install(monkeypatch):
    for module in ("reasoning_gym", "reasoning_gym.factory"):
        monkeypatch.setitem(sys.modules, module, None)  # None there: an import fails as if there were no such package
    with pytest.raises(ConfigError) as caught:
        validate_task(config("reasoning_gym:chain_sum"), seed=0)
    assert (caught.value.field, caught.value.value) == ("task.name", "reasoning_gym:chain_sum")
    assert "needs reasoning-gym, which is not installed" in str(caught.value)
    assert "pip install 'jackpot[reasoning-gym]'" in str(caught.value)


class TestReasoningGym:
    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: it takes a C compiler")

    def test_an_unknown_dataset_is_named_with_its_neighbour(self):
        with pytest.raises(ConfigError) as caught:
            validate_task(config("reasoning_gym:chain_sun"), seed=1)
        assert caught.value.field == "task.name"
        assert "Did you mean 'chain_sum'" in str(caught.value)

    def test_questions_are_reproducible_disjoint_and_scored(self):
        task = validate_task(config("reasoning_gym:chain_sum", min_terms=2, max_terms=2, max_digits=1, size=60), seed=3)
        again = build_task(config("reasoning_gym:chain_sum", min_terms=2, max_terms=2, max_digits=1, size=60), seed=3)
        trained = [item.prompt for item in train_items(task)]
        assert trained == [item.prompt for item in train_items(again)]
        assert len(trained) == 60
        assert not set(trained) & {item.prompt for item in task.eval_items(100)}
        item = task.train_prompt(7)
        assert task.reward(item, f" {item.metadata['answer']}\n") == 1.0
        assert task.reward(item, "no idea") < 0.5

    def test_another_seed_asks_other_questions(self):
        one, two = (build_task(config("reasoning_gym:chain_sum", size=20), seed) for seed in (0, 1))
        assert [item.prompt for item in train_items(one)] != [item.prompt for item in train_items(two)]

    def test_the_answer_is_looked_for_in_its_tags(self):
        task = build_task(config("reasoning_gym:chain_sum", answer_tag="answer"), seed=3)
        item = task.train_prompt(0)
        assert task.reward(item, f"I think <answer>{item.metadata['answer']}</answer>, probably") == 1.0
        assert task.reward(item, item.metadata["answer"]) == 0.0

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"min_term": 2}, "Did you mean 'min_terms'?"),
            ({"min_terms": -1}, "min_terms must be positive"),
            ({"size": 0}, "is not between 1 and"),
            ({"seed": 3}, "unknown parameter"),
        ],
    )
    def test_bad_parameters_are_named(self, params, message):
        with pytest.raises(ConfigError) as caught:
            validate_task(config("reasoning_gym:chain_sum", **params), seed=0)
        assert message in str(caught.value)


def test_answers_are_extracted_and_compared():
    assert tagged_answer("<b>x</b>", "answer") is None
    assert final_answer("3 * 4 = 12\n#### 12") == "12"
    assert exact_match("12", " 12\n") == 1.0
    assert exact_match("12", "12.") == 0.0
    assert math_verify("1/2", r"so it is $\frac{2}{4}$") == 1.0
    assert math_verify("work #### 1,000", "The answer is 1000.") == 1.0
    assert math_verify(r"\sqrt{2}", r"$\boxed{2^{1/2}}$") == 1.0
    assert math_verify("1/2", "one third") == 0.0
    with pytest.raises(ValueError, match="holds no mathematical expression"):
        math_verify("", "3")
