"""Tasks: what they ask, what they hold out, what they reward, and what they refuse before anything starts."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

from jackpot.config import TaskConfig
from jackpot.errors import ConfigError
from jackpot.orchestrator.tasks import TaskItem, UnreadableAnswer, build_task, prompt_key, validate_task
from jackpot.orchestrator.tasks.answers import exact_match, final_answer, tagged_answer
from jackpot.orchestrator.tasks.procedural import entry_from_json, entry_to_json
from jackpot.process.children import HASH_SEED


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

    def test_a_dot_in_a_key_goes_into_an_object(self, tmp_path):
        rows = [{"q": f"{n}?", "reward_model": {"ground_truth": str(n), "style": "rule"}} for n in range(4)]
        path = write_rows(tmp_path / "data.jsonl", rows)
        keys = {"prompt_key": "q", "answer_key": "reward_model.ground_truth"}
        task = validate_task(config("jsonl", path=path, **keys), seed=0)
        assert {item.metadata["answer"] for item in train_items(task)} < {"0", "1", "2", "3"}
        with pytest.raises(ConfigError) as caught:
            validate_task(config("jsonl", path=path, prompt_key="q", answer_key="reward_model"), seed=0)
        assert 'line 1 ({"ground_truth": "0", "style": ' in str(caught.value)
        assert "set task.params.answer_key to reward_model.ground_truth or reward_model.style" in caught.value.remedy
        with pytest.raises(ConfigError, match=r"line 1 has no 'ground_truth'. It has 'reward_model.ground_truth'"):
            validate_task(config("jsonl", path=path, prompt_key="q", answer_key="ground_truth"), seed=0)

    def test_prompts_that_differ_in_white_space_are_on_one_side(self, tmp_path):
        rows = [{"prompt": f"{n // 3}{' ' * (n % 3)} +  1", "answer": n} for n in range(30)]
        chats = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in rows]
        for number, content in enumerate((rows, chats)):
            path = write_rows(tmp_path / f"{number}.jsonl", content)
            task = validate_task(config("jsonl", path=path, eval_fraction=0.5), seed=1)
            held_out = {prompt_key(item.prompt) for item in task.eval_items(100)}
            trained = [prompt_key(item.prompt) for item in train_items(task)]
            assert (len(held_out), len(trained), held_out & set(trained)) == (5, 15, set())

    def test_one_prompt_with_any_white_space_cannot_be_on_both_sides(self, tmp_path):
        path = write_rows(tmp_path / "data.jsonl", [{"prompt": f"6 + 6?{' ' * n}", "answer": 12} for n in range(8)])
        with pytest.raises(ConfigError, match=r"no prompt left to train on.*differ in more than white space"):
            validate_task(config("jsonl", path=path), seed=0)

    def test_a_mark_of_byte_order_windows_lines_and_odd_separators_are_read(self, tmp_path):
        path = tmp_path / "data.jsonl"
        rows = [{"prompt": "a\u2028b", "answer": 1}, {"prompt": "c\x85d", "answer": 0}, {"prompt": "e", "answer": -1}]
        text = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_bytes(text.encode())
        task = build_task(config("jsonl", path=str(path)), seed=0)
        found = {item.prompt: item.metadata for item in (*train_items(task), *task.eval_items(9))}
        assert found == {row["prompt"]: {"answer": str(row["answer"]), "line": n + 1} for n, row in enumerate(rows)}

    @pytest.mark.parametrize("value", [0, -1, 3, 3.5, "007", "1e21", "0"])
    @pytest.mark.parametrize("reward", ["exact_match", "math_verify"])
    def test_texts_and_numbers_are_answers(self, tmp_path, value, reward):
        rows = [{"prompt": "a", "answer": value}, {"prompt": "b", "answer": value}]
        task = validate_task(config("jsonl", path=write_rows(tmp_path / "d.jsonl", rows), reward=reward), seed=0)
        item = task.train_prompt(0)
        assert task.reward(item, str(value)) == 1.0
        assert task.reward(item, "") == 0.0

    @pytest.mark.parametrize(
        "value", [None, True, False, [], ["3", "three"], {"a": 3}, {}, "", " \n", "#### ", float("nan")]
    )
    @pytest.mark.parametrize("reward", ["exact_match", "math_verify"])
    def test_what_is_no_answer_is_refused_with_its_row(self, tmp_path, value, reward):
        rows = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": value}, {"prompt": "c", "answer": 2}]
        with pytest.raises(ConfigError) as caught:
            validate_task(config("jsonl", path=write_rows(tmp_path / "d.jsonl", rows), reward=reward), seed=0)
        assert f"the answer 'answer' is none in line 2 ({json.dumps(value)})" in str(caught.value)
        assert "a text or a number" in caught.value.remedy

    def test_every_bad_answer_is_named_up_to_a_bound(self, tmp_path):
        rows = [{"prompt": f"{n}", "answer": None} for n in range(12)]
        with pytest.raises(ConfigError, match=r"line 1 \(null\), line 2 .*line 10 \(null\) and 2 more"):
            validate_task(config("jsonl", path=write_rows(tmp_path / "d.jsonl", rows)), seed=0)

    @pytest.mark.parametrize(
        ("name", "content", "keys"),
        [
            ("a table.csv", 'q,answer\n"What is 1+1?",2\n"Two\nlines?",3\n', {"prompt_key": "q"}),
            ("rows.json", '[\n {"prompt": "1+1?", "answer": 2},\n {"prompt": "1+2?", "answer": 3}\n]\n', {}),
            (
                "chats.jsonl",
                '{"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}\n'
                '{"messages": [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "3"}]}\n',
                {},
            ),
        ],
    )
    def test_other_formats_are_refused_with_the_line_that_converts_them(self, tmp_path, name, content, keys):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError) as caught:
            validate_task(config("jsonl", path=str(tmp_path / name)), seed=0)
        assert caught.value.remedy.startswith("Convert it: python -c ")
        command = caught.value.remedy.removeprefix("Convert it: python")
        subprocess.run(f"{sys.executable}{command}", shell=True, check=True)
        converted = str((tmp_path / name).with_suffix(".rows.jsonl"))
        task = validate_task(config("jsonl", path=converted, **keys), seed=0)
        assert {item.metadata["answer"] for item in (*train_items(task), *task.eval_items(9))} == {"2", "3"}

    def test_a_grader_that_fails_at_a_text_calls_it_wrong_and_says_so(self, tmp_path):
        path = write_rows(tmp_path / "d.jsonl", list(self.ROWS))
        task = build_task(config("jsonl", path=path), seed=0)

        def fail(answer, completion):
            raise RecursionError(completion)

        task._reward = fail
        reward = task.reward(task.train_prompt(0), "((((")
        assert isinstance(reward, UnreadableAnswer)
        assert (reward, reward.reason) == (0.0, "RecursionError: ((((")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "holds no prompts"),
            ('{"prompt": "a", "answer": "b"}\n{"prompt": \n', "line 2 is not JSON"),
            ("[1]\n", "line 1 is not a JSON object"),
            ('{"prompt": " ", "answer": "b"}\n', "line 1: the prompt is neither a string nor a list"),
            ("PAR1\x15\x04", "is a Parquet file"),
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

    @pytest.mark.parametrize("name", ["prime_factorization", "polynomial_multiplication", "isomorphic_strings"])
    def test_a_wrong_text_is_worth_nothing_and_the_answer_all_in_every_process(self, name):
        code = (
            "import json, sys\n"
            "from jackpot.config import TaskConfig\n"
            "from jackpot.orchestrator.tasks import TaskItem, build_task\n"
            "task = build_task(TaskConfig(name=sys.argv[1], params={'size': 100}), 5)\n"
            "if sys.argv[2] == 'draw':\n"
            "    items = [task.train_prompt(index) for index in range(10)]\n"
            "    print(json.dumps([[item.prompt, dict(item.metadata)] for item in items]))\n"
            "else:\n"
            "    items = [TaskItem(*row) for row in json.load(sys.stdin)]\n"
            "    texts = ['', 'a', '7', '2 x 3', '12 × 0.5', 'x**2', '{}', '[1', 'None', 'I do not know', '-']\n"
            "    answers = [task.reward(item, item.metadata['answer']) for item in items]\n"
            "    print(json.dumps([answers, [max(task.reward(item, t) for t in texts) for item in items]]))\n"
        )

        def python(step: str, hash_seed: str, given: str = "") -> str:
            return subprocess.run(
                [sys.executable, "-c", code, f"reasoning_gym:{name}", step],
                env={**os.environ, "PYTHONHASHSEED": hash_seed},
                input=given,
                capture_output=True,
                text=True,
                check=True,
            ).stdout

        drawn = python("draw", "1")
        for hash_seed in ("2", "3"):
            right, wrong = json.loads(python("grade", hash_seed, drawn))
            assert right == [1.0] * 10
            assert max(wrong) < 0.5

    @pytest.mark.parametrize("name", ["polynomial_multiplication", "isomorphic_strings"])
    def test_prompts_that_follow_the_order_of_sets_are_the_same_in_every_service(self, name):
        code = (
            "import sys\n"
            "from jackpot.config import TaskConfig\n"
            "from jackpot.orchestrator.tasks import build_task\n"
            "task = build_task(TaskConfig(name=sys.argv[1], params={'size': 100}), 5)\n"
            "print([task.train_prompt(index).prompt for index in range(10)])\n"
        )

        def prompts(variables: dict[str, str]) -> str:
            unset = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
            command = [sys.executable, "-c", code, f"reasoning_gym:{name}"]
            return subprocess.run(command, env=unset | variables, capture_output=True, text=True, check=True).stdout

        assert prompts(HASH_SEED) == prompts(HASH_SEED)
        assert prompts({"PYTHONHASHSEED": "1"}) != prompts({"PYTHONHASHSEED": "2"})

    def test_prompts_do_not_depend_on_what_was_drawn_before(self):
        """list_functions draws from Python's global generator, too."""
        forwards, backwards = (build_task(config("reasoning_gym:list_functions", size=30), seed=5) for _ in range(2))
        random.seed(1)
        expected = [forwards.train_prompt(index).prompt for index in range(30)]
        random.seed(2)
        state = random.getstate()
        assert [backwards.train_prompt(index).prompt for index in reversed(range(30))] == expected[::-1]
        assert random.getstate() == state

    def test_what_a_grader_raises_is_a_wrong_answer_with_its_reason(self):
        task = build_task(config("reasoning_gym:prime_factorization"), seed=3)
        reward = task.reward(task.train_prompt(0), "I do not know")
        assert isinstance(reward, UnreadableAnswer)
        assert reward == 0.0
        assert reward.reason.startswith("ValueError: ")

    def test_an_entry_comes_back_from_json_as_it_was(self):
        entry = {"metadata": {"grid": ((1, 2), [3, (4,)]), "by_id": {1: "a", (2, 3): None}, "share": 0.5, "ok": True}}
        assert entry_from_json(json.loads(json.dumps(entry_to_json(entry)))) == entry
        assert entry_from_json(entry_to_json(Fraction(1, 3))) == "1/3"

    def test_questions_that_hardly_vary_are_never_on_both_sides(self):
        few = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "size": 30}
        task = build_task(config("reasoning_gym:chain_sum", **few), seed=3)
        task._source.entry = lambda offset, index: {"question": "1 + 1 =", "answer": "2", "metadata": {}}
        sides = [len(task.eval_items(5)) > 0]
        try:
            task.train_prompt(0)
            sides.append(True)
        except ConfigError as error:
            assert "held out" in str(error)
            sides.append(False)
        assert sorted(sides) == [False, True]

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
    assert final_answer(r"It is $\boxed{\frac{8}{5}}$.") == r"\frac{8}{5}"
    assert final_answer(" 12 ") == "12"
    assert exact_match("12", " 12\n") == 1.0
    assert exact_match("12", "12.") == 0.0
    assert exact_match("12", r"\boxed{12}") == 0.0
    assert exact_match("12", "The answer is 12.") == 0.0
