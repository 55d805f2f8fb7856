"""Rewards in real worker processes: values, limits, and what a hanging or crashing reward costs."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from jackpot.config import TaskConfig
from jackpot.errors import JackpotError, RewardError
from jackpot.orchestrator.rewards import Judgement, RewardPool, rewarded
from jackpot.orchestrator.tasks import TaskItem
from jackpot.telemetry import Metrics
from jackpot.trajectory import Trajectory, VersionSpan

TASK = '''
import os, sys, time
from pathlib import Path

from jackpot.orchestrator.tasks import UnreadableAnswer

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
        if completion == "unreadable":
            return UnreadableAnswer(ZeroDivisionError("in the grader"))
        if completion == "once" and self.marks.read_text().count("once") == 1:
            raise RuntimeError("the first time fails")
        return float(completion) if completion != "once" else item.metadata["value"]
'''
ITEM = TaskItem("prompt", {"value": 0.5})


@pytest.fixture
async def make_pool(tmp_path: Path, monkeypatch):
    (tmp_path / "obeying.py").write_text(TASK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pools = []

    def make(**settings: Any) -> RewardPool:
        config = TaskConfig(
            name="python:obeying:Task",
            params={"marks": str(tmp_path / "marks")},
            **{"reward_timeout_seconds": 0.3, **settings},
        )
        metrics = Metrics("job", CollectorRegistry())
        pools.append(RewardPool(config, seed=0, metrics=metrics, failures=tmp_path / "failures.jsonl"))
        return pools[-1]

    yield make
    for pool in pools:
        await pool.close()


@pytest.fixture
def pool(make_pool) -> RewardPool:
    return make_pool()


def counted(pool: RewardPool) -> dict[str, float]:
    """Failed and unreadable completions so far; a key that is missing would be a counter that Prometheus misses."""
    registry = pool._metrics._registry
    return {
        outcome: registry.get_sample_value("jackpot_reward_failures_total", {"job_id": "job", "outcome": outcome})
        for outcome in ("failed", "unreadable")
    }


async def rewards(pool: RewardPool, completions: list[str]) -> list[float | None]:
    return [judgement.reward for judgement in await pool.judge(ITEM, completions)]


def marks(tmp_path: Path) -> list[list[str]]:
    return [line.split() for line in (tmp_path / "marks").read_text().splitlines()]


async def test_rewards_come_back_in_order(pool, tmp_path):
    assert await rewards(pool, ["1", "0", "-2.5"]) == [1.0, 0.0, -2.5]
    assert await rewards(pool, ["3"]) == [3.0]
    assert {pid for _, pid in marks(tmp_path)} != {str(os.getpid())}
    assert len({pid for _, pid in marks(tmp_path)}) == 1  # one process is enough for one caller


async def test_a_reward_that_failed_is_tried_again(pool, tmp_path):
    assert await rewards(pool, ["1", "once", "2"]) == [1.0, 0.5, 2.0]
    assert [text for text, _ in marks(tmp_path)] == ["1", "once", "2", "once"]


@pytest.mark.parametrize(
    ("bad", "attempts", "reason"),
    [
        ("hang", 1, "failed 1 times: no answer within 0.3 s (task.reward_timeout_seconds)"),  # no second timeout
        ("crash", 2, "failed 2 times: its process ended unexpectedly"),
        ("nan", 2, "failed 2 times: RewardError: the reward is nan, not a finite number"),
        ("word", 2, "failed 2 times: ValueError: could not convert string to float: 'word'"),
    ],
)
@pytest.mark.parametrize(("policy", "reward"), [("zero", 0.0), ("drop", None)])
async def test_a_failing_reward_costs_its_own_completion(make_pool, tmp_path, bad, attempts, reason, policy, reward):
    pool = make_pool(on_reward_failure=policy)
    assert await pool.judge(ITEM, ["1", bad, "2"]) == [
        Judgement(1.0),
        Judgement(reward, failure=reason),
        Judgement(2.0),
    ]
    assert [text for text, _ in marks(tmp_path)].count(bad) == attempts
    assert await rewards(pool, ["4"]) == [4.0]

    (row,) = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert (row["prompt"], row["completion"], row["failure"], row["reward"]) == ("prompt", bad, reason, reward)
    assert counted(pool) == {"failed": 1.0, "unreadable": 0.0}


async def test_each_hanging_completion_costs_one_timeout(make_pool):
    pool = make_pool()
    assert await rewards(pool, ["1"]) == [1.0]  # the process is up
    started = time.monotonic()
    assert await rewards(pool, ["hang", "1", "hang", "2"]) == [0.0, 1.0, 0.0, 2.0]
    assert time.monotonic() - started >= 0.6  # both, and never less


async def test_a_completion_that_its_grader_cannot_read_is_wrong_and_counted(make_pool, tmp_path):
    pool = make_pool()
    assert await pool.judge(ITEM, ["unreadable", "1"]) == [
        Judgement(0.0, unreadable="ZeroDivisionError: in the grader"),
        Judgement(1.0),
    ]
    assert counted(pool) == {"failed": 0.0, "unreadable": 1.0}
    assert not (tmp_path / "failures.jsonl").exists()


def trajectory(index: int) -> Trajectory:
    ones = np.ones(1, np.float32)
    return Trajectory(
        trajectory_id=f"g#{index}",
        token_ids=np.array([index], np.uint32),
        actor_logprobs=-ones,
        topk_ids=None,
        topk_logprobs=None,
        version_spans=(VersionSpan(0, 0, 1),),
        finish_reason="stop",
    )


def test_a_group_keeps_the_trajectories_that_have_a_reward():
    group = [trajectory(index) for index in range(3)]
    zeroed = [Judgement(1.0), Judgement(0.0, failure="hung"), Judgement(0.5)]
    assert [(t.trajectory_id, t.reward) for t in rewarded(group, zeroed)] == [("g#0", 1.0), ("g#1", 0.0), ("g#2", 0.5)]
    dropped = [Judgement(1.0), Judgement(None, failure="hung"), Judgement(0.5)]
    assert [(t.trajectory_id, t.reward) for t in rewarded(group, dropped)] == [("g#0", 1.0), ("g#2", 0.5)]
    assert [t.reward for t in rewarded(group[:1], [Judgement(1.0)])] == [1.0]


@pytest.mark.parametrize("reward", [0.0, None])
def test_a_group_whose_rewards_all_failed_says_that_the_reward_is_at_fault(reward):
    group = [trajectory(index) for index in range(2)]
    with pytest.raises(RewardError, match="2 of 2 rewards failed, the first one no network"):
        rewarded(group, [Judgement(reward, failure="no network")] * 2)


def test_one_trajectory_that_is_left_has_nothing_to_be_compared_with():
    group = [trajectory(index) for index in range(2)]
    with pytest.raises(RewardError, match="1 of 2 rewards failed, the first one hung"):
        rewarded(group, [Judgement(1.0), Judgement(None, failure="hung")])


async def test_groups_are_rewarded_side_by_side(pool, tmp_path):
    await asyncio.gather(*(rewards(pool, ["1"] * 50) for _ in range(4)))
    assert len({pid for _, pid in marks(tmp_path)}) == 2


async def test_cancelling_leaves_no_answer_behind(pool):
    assert await rewards(pool, ["1"]) == [1.0]
    waiting = asyncio.create_task(rewards(pool, ["7", "hang"]))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await rewards(pool, ["2"]) == [2.0]


async def test_what_a_process_had_half_written_when_it_ended_is_nobodys_answer(pool):
    assert await rewards(pool, ["1"]) == [1.0]
    (worker,) = [one for one in pool._workers if one._process is not None]
    worker._read = b'{"reward": 9'
    await worker.end()
    assert await rewards(pool, ["2"]) == [2.0]


async def test_a_task_that_cannot_be_built_says_why(tmp_path):
    pool = RewardPool(TaskConfig(name="jsonl", params={"path": str(tmp_path / "none")}), seed=0)
    with pytest.raises(JackpotError, match=r"cannot build its task: task\.params\.path"):
        await rewards(pool, ["1"])
    await pool.close()
