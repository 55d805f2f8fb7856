"""Computes rewards in separate processes, with time limits and retries, and counts failures."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jackpot.config import TaskConfig
from jackpot.errors import DeadlineError, JackpotError, RewardError
from jackpot.orchestrator.tasks import Item
from jackpot.process.children import HASH_SEED
from jackpot.storage.json_files import JsonLinesWriter
from jackpot.telemetry import Metrics
from jackpot.trajectory import Trajectory

LOG = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 16
START_TIMEOUT_SECONDS = 120.0  # importing a large task package from a cold disk takes tens of seconds


@dataclass(frozen=True, slots=True)
class Judgement:
    """The reward of one completion, or why it has none."""

    reward: float | None  # None: the reward failed and the completion is left out (task.on_reward_failure: drop)
    failure: str = ""  # why the reward function returned none
    unreadable: str = ""  # why the grader could not read the completion, which counts as wrong


@dataclass(frozen=True, slots=True)
class _Answer:
    """A reward process's answer for one completion."""

    reward: float | None
    problem: str = ""
    final: bool = False  # a retry would only take the same time again


class RewardPool:
    """Up to ``num_workers`` processes that hold the task; each starts when it is first needed.

    Args:
        task: the task, with its time limit and attempts per reward.
        seed: the job's seed.
        num_workers: groups whose rewards are computed concurrently.
        metrics: counts failures.
        failures: a file of JSON lines that names each completion whose reward failed.
    """

    def __init__(
        self,
        task: TaskConfig,
        seed: int,
        num_workers: int = 2,
        *,
        metrics: Metrics | None = None,
        failures: Path | None = None,
    ) -> None:
        self._task = task
        self._metrics = metrics
        if metrics is not None:
            metrics.expect_rewards()
        self._failures = None if failures is None else JsonLinesWriter(failures)
        self._workers = [_Worker(task, seed) for _ in range(num_workers)]
        # Last in, first out: a second process starts only when the first is busy.
        self._idle: asyncio.LifoQueue[_Worker] = asyncio.LifoQueue()
        for worker in reversed(self._workers):
            self._idle.put_nowait(worker)

    async def judge(self, item: Item, completions: Sequence[str]) -> list[Judgement]:
        """The reward of each completion. A failure affects only its completion, and a timeout is not retried."""
        judged: dict[int, Judgement] = {}
        attempts = [0] * len(completions)
        while missing := [index for index in range(len(completions)) if index not in judged]:
            async with self._worker() as worker:
                answers = await worker.ask(item, [completions[index] for index in missing])
            for index, answer in zip(missing, answers, strict=False):  # a process that ended leaves the rest unanswered
                attempts[index] += 1
                last = answer.final or attempts[index] >= self._task.reward_attempts
                if answer.reward is not None:
                    judged[index] = Judgement(answer.reward, unreadable=answer.problem)
                elif last:
                    judged[index] = self._failed(f"failed {attempts[index]} times: {answer.problem}")
        judgements = [judged[index] for index in range(len(completions))]
        self._count(item, completions, judgements)
        return judgements

    def _count(self, item: Item, completions: Sequence[str], judgements: Sequence[Judgement]) -> None:
        for completion, judgement in zip(completions, judgements, strict=True):
            if self._metrics is not None and (judgement.failure or judgement.unreadable):
                self._metrics.count_reward_failure("failed" if judgement.failure else "unreadable")
            if judgement.failure:
                LOG.warning("a reward %s", judgement.failure)
                self._write_failure(item, completion, judgement)

    def _write_failure(self, item: Item, completion: str, judgement: Judgement) -> None:
        if self._failures is not None:
            row = {
                "time": time.time(),
                "prompt": item.prompt,
                "completion": completion,
                "failure": judgement.failure,
                "reward": judgement.reward,
            }
            self._failures.append([row])

    def _failed(self, failure: str) -> Judgement:
        return Judgement(0.0 if self._task.on_reward_failure == "zero" else None, failure=failure)

    async def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            await worker.end()

    @asynccontextmanager
    async def _worker(self) -> AsyncIterator[_Worker]:
        worker = await self._idle.get()
        try:
            yield worker
        finally:
            self._idle.put_nowait(worker)


def rewarded(trajectories: Sequence[Trajectory], judged: Sequence[Judgement]) -> tuple[Trajectory, ...]:
    """The trajectories of a group that have rewards, with their rewards.

    Raises:
        RewardError: every reward failed, so the reward function and not a text is at fault; or only one trajectory is
            left, with nothing to compare it with.
    """
    failures = [judgement.failure for judgement in judged if judgement.failure]
    kept = tuple(
        replace(trajectory, reward=judgement.reward)
        for trajectory, judgement in zip(trajectories, judged, strict=True)
        if judgement.reward is not None
    )
    if failures and (len(failures) == len(judged) or len(kept) < 2):
        raise RewardError(f"{len(failures)} of {len(judged)} rewards failed, the first one {failures[0]}")
    return kept


class _Worker:
    """One process; restarted after it hangs or crashes."""

    def __init__(self, task: TaskConfig, seed: int) -> None:
        self._task = task
        self._seed = seed
        self._process: Process | None = None
        self._read = b""  # output that has not been parsed

    async def ask(self, item: Item, completions: Sequence[str]) -> list[_Answer]:
        """The answers in order. If the process hangs or crashes, the last one is a failure and the rest is missing."""
        limit = self._task.reward_timeout_seconds
        answers: list[_Answer] = []
        try:
            process = self._process or await self._start()
            request = {"prompt": item.prompt, "metadata": dict(item.metadata), "completions": list(completions)}
            await _write(process, request)
            while len(answers) < len(completions):
                for answer in await self._next_answers(process, limit):
                    problem = str(answer.get("error") or answer.get("unreadable", ""))
                    answers.append(_Answer(answer.get("reward"), problem))
        except TimeoutError:
            await self.end()
            problem = f"no answer within {limit:g} s (task.reward_timeout_seconds)"
            answers.append(_Answer(None, problem, final=True))
        except (EOFError, ConnectionError):
            await self.end()
            answers.append(_Answer(None, "its process ended unexpectedly"))
        except BaseException:  # also when cancelled: late answers would be taken for those to the next request
            await self.end()
            raise
        return answers

    async def end(self) -> None:
        process, self._process, self._read = self._process, None, b""
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.communicate()  # also closes the pipes

    async def _start(self) -> Process:
        self._process = process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "jackpot.orchestrator.reward_worker"),
            stdin=PIPE,
            stdout=PIPE,
            env=HASH_SEED | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | os.environ,
        )
        first = {"task": self._task.model_dump(mode="json"), "seed": self._seed}
        try:
            await _write(process, first)
            (answer,) = await self._next_answers(process, START_TIMEOUT_SECONDS)
        except TimeoutError:
            raise DeadlineError(f"the task {self._task.name} to load for rewards", START_TIMEOUT_SECONDS) from None
        except (EOFError, ConnectionError):
            raise JackpotError(f"the reward process of {self._task.name} ended at its start; see the log") from None
        if "error" in answer:
            raise JackpotError(f"the reward process cannot build its task: {answer['error']}")
        return process

    async def _next_answers(self, process: Process, timeout_seconds: float) -> list[dict[str, Any]]:
        """The available answers, once there is at least one. Most take less time than reading each one separately.

        Raises:
            TimeoutError: no answer came in time.
            EOFError: the process ended.
        """
        assert process.stdout is not None
        async with asyncio.timeout(timeout_seconds):
            while b"\n" not in self._read:
                read = await process.stdout.read(_CHUNK_BYTES)
                if not read:
                    raise EOFError
                self._read += read
        *lines, self._read = self._read.split(b"\n")
        return [json.loads(line) for line in lines]


async def _write(process: Process, content: Mapping[str, object]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(content).encode() + b"\n")
    await process.stdin.drain()
