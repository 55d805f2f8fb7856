"""Rewards in real worker processes: values, limits, and what a hanging or crashing reward costs."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from jackpot.config import TaskConfig
from jackpot.errors import JackpotError, RewardError
from jackpot.orchestrator.rewards import RewardPool
from jackpot.orchestrator.tasks import TaskItem

TASK = '''
import os, sys, time
from pathlib import Path

class Task:
    """Obeys the completion: a number, or a way to fail."""

    def __init__(self, params, seed):
        self.num_prompts = 0
        self.marks = Path(params["marks"])

    def train_prompt(self, index):
        raise IndexError(index)

    def eval_items(self, count):
        return ()

    def reward(self, item, completion):
        print("a task may print")
        with self.marks.open("a") as file:
            file.write(f"{completion} {os.getpid()}\\n")
        if completion == "hang":
            time.sleep(60)
        if completion == "crash":
            os._exit(9)
        if completion == "once" and self.marks.read_text().count("once") == 1:
            raise RuntimeError("the first time fails")
        return float(completion) if completion != "once" else item.metadata["value"]
'''
ITEM = TaskItem("prompt", {"value": 0.5})


@pytest.fixture
async def pool(tmp_path: Path, monkeypatch):
    (tmp_path / "obeying.py").write_text(TASK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config = TaskConfig(
        name="python:obeying:Task", params={"marks": str(tmp_path / "marks")}, reward_timeout_seconds=0.3
    )
    pool = RewardPool(config, seed=0)
    yield pool
    await pool.close()


def marks(tmp_path: Path) -> list[list[str]]:
    return [line.split() for line in (tmp_path / "marks").read_text().splitlines()]


async def test_rewards_come_back_in_order(pool, tmp_path):
    assert await pool.rewards(ITEM, ["1", "0", "-2.5"]) == [1.0, 0.0, -2.5]
    assert await pool.rewards(ITEM, ["3"]) == [3.0]
    assert {pid for _, pid in marks(tmp_path)} != {str(os.getpid())}
    assert len({pid for _, pid in marks(tmp_path)}) == 1  # one process is enough for one caller


async def test_a_reward_that_failed_is_tried_again(pool, tmp_path):
    assert await pool.rewards(ITEM, ["1", "once", "2"]) == [1.0, 0.5, 2.0]
    assert [text for text, _ in marks(tmp_path)] == ["1", "once", "2", "once"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("hang", "failed 2 times: no answer within 0.3 s"),
        ("crash", "failed 2 times: its process ended unexpectedly"),
        ("nan", "failed 2 times: RewardError: the reward is nan"),
        ("word", "failed 2 times: ValueError: could not convert string"),
    ],
)
async def test_a_failing_reward_is_an_error_and_never_zero(pool, tmp_path, bad, reason):
    with pytest.raises(RewardError, match=reason):
        await pool.rewards(ITEM, ["1", bad, "2"])
    assert [text for text, _ in marks(tmp_path)].count(bad) == 2

    outcomes = await pool.try_rewards(ITEM, ["1", bad, "2"])
    assert (outcomes[0], outcomes[2]) == (1.0, 2.0)
    assert isinstance(outcomes[1], RewardError)
    assert await pool.rewards(ITEM, ["4"]) == [4.0]


async def test_groups_are_rewarded_side_by_side(pool, tmp_path):
    await asyncio.gather(*(pool.rewards(ITEM, ["1"] * 50) for _ in range(4)))
    assert len({pid for _, pid in marks(tmp_path)}) == 2


async def test_cancelling_leaves_no_answer_behind(pool):
    assert await pool.rewards(ITEM, ["1"]) == [1.0]
    waiting = asyncio.create_task(pool.rewards(ITEM, ["7", "hang"]))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await pool.rewards(ITEM, ["2"]) == [2.0]


async def test_what_a_process_had_half_written_when_it_ended_is_nobodys_answer(pool):
    assert await pool.rewards(ITEM, ["1"]) == [1.0]
    (worker,) = [one for one in pool._workers if one._process is not None]
    worker._read = b'{"reward": 9'
    await worker.end()
    assert await pool.rewards(ITEM, ["2"]) == [2.0]


async def test_a_task_that_cannot_be_built_says_why(tmp_path):
    pool = RewardPool(TaskConfig(name="jsonl", params={"path": str(tmp_path / "none")}), seed=0)
    with pytest.raises(JackpotError, match=r"cannot build its task: task\.params\.path"):
        await pool.rewards(ITEM, ["1"])
    await pool.close()
