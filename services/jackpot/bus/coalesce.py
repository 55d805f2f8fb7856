"""Small calls that are made at about the same time, carried out together: the way there costs more than they do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Generic, TypeVar

Call = TypeVar("Call")
Result = TypeVar("Result")

MOST_CALLS = 64
"""Carried out together: the first of them waits for the last."""


async def all_ended(calls: Iterable[Awaitable[Result]]) -> list[Result]:
    """Results of calls that are made beside one another. If some fail, the first error, but only once all have ended:
    whoever handles it meets none that is still under way."""
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    results: list[Result] = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results


class Coalescer(Generic[Call, Result]):
    """Gathers calls while others are under way, and hands them on in the order in which they were made.

    A caller that is cancelled does not keep its call from being carried out, nor does it disturb the others.

    Args:
        carry_out: does a round of calls; each one's result, or the error that it met. What it raises, all of them met.
    """

    def __init__(self, carry_out: Callable[[Sequence[Call]], Awaitable[Sequence[Result | Exception]]]) -> None:
        self._carry_out = carry_out
        self._waiting: list[tuple[Call, asyncio.Future[Result]]] = []
        self._rounds: asyncio.Task[None] | None = None

    async def __call__(self, call: Call) -> Result:
        """The result of a call, or its error raised."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((call, future))
        if self._rounds is None:
            self._rounds = loop.create_task(self._run_rounds())
        return await future

    async def close(self) -> None:
        """End the round under way and every call that waits: what a caller that was cancelled left behind, too."""
        rounds, self._rounds = self._rounds, None
        if rounds is not None:
            rounds.cancel()
            await asyncio.wait({rounds})
        for _, future in self._waiting:  # a task that is cancelled before it begins ends none
            future.cancel()
        self._waiting = []

    async def _run_rounds(self) -> None:
        try:
            while self._waiting:
                round_, self._waiting = self._waiting[:MOST_CALLS], self._waiting[MOST_CALLS:]
                await self._run_round(round_)
        finally:
            self._rounds = None
            for _, future in self._waiting:  # the loop is ending
                future.cancel()

    async def _run_round(self, round_: Sequence[tuple[Call, asyncio.Future[Result]]]) -> None:
        results: Sequence[Result | Exception]
        try:
            results = await self._carry_out([call for call, _ in round_])
        except Exception as error:
            results = [error] * len(round_)
        except BaseException:
            for _, future in round_:
                future.cancel()
            raise
        for (_, future), result in zip(round_, results, strict=True):
            if future.done():
                continue  # its caller is gone
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
