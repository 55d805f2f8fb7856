"""Small calls made at about the same time are executed as one: the round trip costs more than the calls."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Generic, TypeVar

Call = TypeVar("Call")
Result = TypeVar("Result")

MOST_CALLS = 64
"""Most calls in a round: the first one waits for the last."""


async def all_ended(calls: Iterable[Awaitable[Result]]) -> list[Result]:
    """The results of concurrent calls.

    If some fail, the first error is raised, but only after all have ended: none is still running when the caller
    handles it.
    """
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    results: list[Result] = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results


class Coalescer(Generic[Call, Result]):
    """Collects calls while a round is running, and executes them as the next round, in the order of the calls.

    Cancelling a caller neither cancels its call nor affects the others.

    Args:
        carry_out: executes a round of calls; returns each call's result or error. If it raises, every call of the round
            fails with that error.
    """

    def __init__(self, carry_out: Callable[[Sequence[Call]], Awaitable[Sequence[Result | Exception]]]) -> None:
        self._carry_out = carry_out
        self._waiting: list[tuple[Call, asyncio.Future[Result]]] = []
        self._rounds: asyncio.Task[None] | None = None

    async def __call__(self, call: Call) -> Result:
        """Make a call: returns its result or raises its error."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((call, future))
        if self._rounds is None:
            self._rounds = loop.create_task(self._run_rounds())
        return await future

    async def close(self) -> None:
        """Cancel the running round and every waiting call, including those whose callers were cancelled."""
        rounds, self._rounds = self._rounds, None
        if rounds is not None:
            rounds.cancel()
            await asyncio.wait({rounds})
        for _, future in self._waiting:  # a task cancelled before it starts does not reach its own cleanup
            future.cancel()
        self._waiting = []

    async def _run_rounds(self) -> None:
        try:
            while self._waiting:
                round_, self._waiting = self._waiting[:MOST_CALLS], self._waiting[MOST_CALLS:]
                await self._run_round(round_)
        finally:
            self._rounds = None
            for _, future in self._waiting:  # the event loop is ending
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
