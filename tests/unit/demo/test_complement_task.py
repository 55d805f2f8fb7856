"""The task: prompts, what is held out, and the reward."""

import json
from dataclasses import asdict

import pytest

from jackpot.config import TaskConfig
from jackpot.demo.task import (
    DIGITS,
    NUM_DIGITS,
    SEPARATORS,
    ComplementItem,
    ComplementTask,
    complement,
    is_held_out,
    prompt_text,
)
from jackpot.errors import ConfigError
from jackpot.orchestrator.tasks import Task, build_task

ITEM = ComplementItem("999999-381592=", {"answer": "618407"})


def test_the_prompt_subtracts_from_all_nines() -> None:
    assert prompt_text("381592") == ITEM.prompt
    assert complement("381592") == ITEM.metadata["answer"]
    assert int(complement("381592")) == 999999 - 381592
    assert complement("999000") == "000999"


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("618407", 1.0),
        ("6 1,8;4 0-7", 1.0),
        ("  6??1(8)4{0}7  ", 1.0),
        ("6 1,8;4 0-8", 0.0),  # one digit wrong
        ("6 1,8;4 0", 0.0),  # one missing
        ("6 1,8;4 0-7 7", 0.0),  # one too many
        ("7 0,4;8 1-6", 0.0),  # the right digits in the wrong order
        ("٦ 1,8;4 0-7", 0.0),  # a six, but not an ASCII one
        (" ,;", 0.0),
        ("", 0.0),
    ],
)
def test_only_the_digits_count(completion: str, reward: float) -> None:
    assert ComplementTask({}, seed=0).reward(ITEM, completion) == reward


def test_separators_are_distinct_and_no_digits() -> None:
    assert len(set(SEPARATORS)) == len(SEPARATORS) == 26
    assert not set(SEPARATORS) & set(DIGITS + "=")


def test_evaluation_prompts_are_disjoint_from_those_of_any_training_run() -> None:
    trained = {
        task.train_prompt(i).prompt for task in (ComplementTask({}, seed) for seed in (0, 1)) for i in range(4096)
    }
    held_out = {item.prompt for seed in (0, 1) for item in ComplementTask({}, seed).eval_items(1024)}
    assert len(held_out) > 1900
    assert not trained & held_out
    assert is_held_out("000000") and is_held_out("123400") and not is_held_out("100000")


def test_every_item_is_well_formed_and_distinct() -> None:
    task = ComplementTask({"prompts": 500}, seed=3)
    items = [task.train_prompt(index) for index in range(task.num_prompts)]
    assert len({item.prompt for item in items}) == 500
    for item in items:
        number = item.prompt.removeprefix("9" * NUM_DIGITS + "-").removesuffix("=")
        assert item.prompt == prompt_text(number)
        assert task.reward(item, " ".join(complement(number))) == 1.0
        assert json.loads(json.dumps(asdict(item))) == asdict(item)


def test_the_same_seed_gives_the_same_prompts() -> None:
    first, again, other = ComplementTask({}, 7), ComplementTask({}, 7), ComplementTask({}, 8)
    assert [first.train_prompt(i) for i in range(100)] == [again.train_prompt(i) for i in range(100)]
    assert [first.train_prompt(i) for i in range(100)] != [other.train_prompt(i) for i in range(100)]
    assert first.eval_items(64) == again.eval_items(64)


def test_fewer_evaluation_prompts_are_the_first_of_more() -> None:
    task = ComplementTask({}, seed=0)
    assert len(task.eval_items(256)) == 256
    assert task.eval_items(16) == task.eval_items(256)[:16]


def test_numbers_may_be_longer() -> None:
    task = ComplementTask({"digits": 10, "prompts": 50}, seed=0)
    item = task.train_prompt(0)
    number = item.prompt.removeprefix("9999999999-").removesuffix("=")
    assert len(number) == 10 and item.prompt == prompt_text(number)
    assert task.reward(item, complement(number)) == 1.0
    assert {len(item.prompt) for item in task.eval_items(20)} == {22}


@pytest.mark.parametrize(
    "params", [{"prompts": 0}, {"prompts": "many"}, {"prompts": True}, {"prompt": 5}, {"digits": 5}]
)
def test_bad_parameters_are_named(params: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"task.params.{next(iter(params))}"):
        ComplementTask(params, seed=0)


def test_a_job_file_finds_the_task_by_its_name() -> None:
    task = build_task(TaskConfig(name="complement", params={"prompts": 10}), seed=0)
    assert isinstance(task, ComplementTask) and isinstance(task, Task)
    assert task.num_prompts == 10
