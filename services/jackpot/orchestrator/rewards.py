"""Rewards, computed in processes of their own: bounded in time, retried, and never silently 0."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from jackpot.config import TaskConfig
from jackpot.errors import DeadlineError, JackpotError, RewardError
from jackpot.orchestrator.tasks import Item

_CHUNK_BYTES = 1 << 16
START_TIMEOUT_SECONDS = 120.0  # importing a large task package from a cold disk takes tens of seconds


class RewardPool:
    """Up to ``num_workers`` processes that hold the task; each is started when it is first needed.

    Args:
        task: the task, with its time limit and attempts per reward.
        seed: the job's seed.
        num_workers: groups whose rewards are computed at the same time.
    """

    def __init__(self, task: TaskConfig, seed: int, num_workers: int = 2) -> None:
        self._task = task
        self._workers = [_Worker(task, seed) for _ in range(num_workers)]
        # Last in, first out: a second process is only started when the first is busy.
        self._idle: asyncio.LifoQueue[_Worker] = asyncio.LifoQueue()
        for worker in reversed(self._workers):
            self._idle.put_nowait(worker)

    async def rewards(self, item: Item, completions: Sequence[str]) -> list[float]:
        """The reward of each completion.

        Raises:
            RewardError: one of them failed ``reward_attempts`` times.
        """
        outcomes = await self.try_rewards(item, completions)
        for outcome in outcomes:
            if isinstance(outcome, RewardError):
                raise outcome
        return [outcome for outcome in outcomes if not isinstance(outcome, RewardError)]

    async def try_rewards(self, item: Item, completions: Sequence[str]) -> list[float | RewardError]:
        """The reward of each completion, or why it has none after ``reward_attempts`` attempts."""
        outcomes: dict[int, float | RewardError] = {}
        attempts = [0] * len(completions)
        while missing := [index for index in range(len(completions)) if index not in outcomes]:
            async with self._worker() as worker:
                answers = await worker.ask(item, [completions[index] for index in missing])
            for index, answer in zip(missing, answers, strict=False):  # a process that ended leaves the rest open
                if isinstance(answer, float):
                    outcomes[index] = answer
                    continue
                attempts[index] += 1
                if attempts[index] >= self._task.reward_attempts:
                    outcomes[index] = RewardError(
                        f"the reward of a completion of {str(item.prompt)[:80]!r} failed "
                        f"{attempts[index]} times: {answer}"
                    )
        return [outcomes[index] for index in range(len(completions))]

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


class _Worker:
    """One process, restarted after it hung or crashed."""

    def __init__(self, task: TaskConfig, seed: int) -> None:
        self._task = task
        self._seed = seed
        self._process: Process | None = None
        self._read = b""  # of its output, and not answered with yet

    async def ask(self, item: Item, completions: Sequence[str]) -> list[float | str]:
        """Rewards or error texts, in order. Ends early, with an error text, where the process hung or crashed."""
        limit = self._task.reward_timeout_seconds
        answers: list[float | str] = []
        try:
            process = self._process or await self._start()
            request = {"prompt": item.prompt, "metadata": dict(item.metadata), "completions": list(completions)}
            await _write(process, request)
            while len(answers) < len(completions):
                for answer in await self._next_answers(process, limit):
                    answers.append(answer["reward"] if "reward" in answer else str(answer["error"]))
        except TimeoutError:
            await self.end()
            answers.append(f"no answer within {limit:g} s (task.reward_timeout_seconds)")
        except (EOFError, ConnectionError):
            await self.end()
            answers.append("its process ended unexpectedly")
        except BaseException:  # also when cancelled: answers under way would be taken for those of the next request
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
            env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ},
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
        """The answers that are there, as soon as there is one: most take less time than the way to each of them.

        Raises:
            TimeoutError: none came in time.
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
