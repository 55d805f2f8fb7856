"""Calls that are made at about the same time go together, and each caller has its own result."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from patience import PATIENCE_SECONDS

from jackpot.bus.coalesce import MOST_CALLS, Coalescer, all_ended


class Doubling:
    """Doubles numbers once it may, refuses negative ones, and remembers its rounds."""

    def __init__(self) -> None:
        self.rounds: list[list[int]] = []
        self.may = asyncio.Event()
        self.may.set()

    async def __call__(self, calls: Sequence[int]) -> list[int | Exception]:
        self.rounds.append(list(calls))
        await self.may.wait()
        if 1000 in calls:
            raise ConnectionError("gone")
        return [ValueError(f"{call} < 0") if call < 0 else 2 * call for call in calls]


async def test_calls_of_one_moment_go_together_in_their_order() -> None:
    doubling = Doubling()
    coalescer = Coalescer(doubling)
    assert await asyncio.gather(*(coalescer(number) for number in (3, 1, 2))) == [6, 2, 4]
    assert await coalescer(5) == 10
    assert doubling.rounds == [[3, 1, 2], [5]]


async def test_calls_made_while_others_are_under_way_make_the_next_round() -> None:
    doubling = Doubling()
    doubling.may.clear()
    coalescer = Coalescer(doubling)
    first = asyncio.create_task(coalescer(1))
    while not doubling.rounds:
        await asyncio.sleep(0)
    later = [asyncio.create_task(coalescer(number)) for number in range(MOST_CALLS + 1)]
    await asyncio.sleep(0)
    doubling.may.set()
    assert await first == 2
    assert await asyncio.gather(*later) == [2 * number for number in range(MOST_CALLS + 1)]
    assert [len(calls) for calls in doubling.rounds] == [1, MOST_CALLS, 1]


async def test_an_error_is_its_callers_alone() -> None:
    outcomes = await asyncio.gather(*map(Coalescer(Doubling()), (1, -1, 2)), return_exceptions=True)
    assert outcomes[0] == 2 and outcomes[2] == 4
    assert isinstance(outcomes[1], ValueError)


async def test_what_ends_a_round_ends_each_of_its_calls_and_no_later_one() -> None:
    coalescer = Coalescer(Doubling())
    outcomes = await asyncio.gather(coalescer(1), coalescer(1000), return_exceptions=True)
    assert all(isinstance(outcome, ConnectionError) for outcome in outcomes)
    assert await coalescer(1) == 2


async def test_a_caller_that_is_cancelled_disturbs_no_other() -> None:
    doubling = Doubling()
    doubling.may.clear()
    coalescer = Coalescer(doubling)
    leaving, staying = asyncio.create_task(coalescer(1)), asyncio.create_task(coalescer(2))
    while not doubling.rounds:
        await asyncio.sleep(0)
    leaving.cancel()
    doubling.may.set()
    assert await staying == 4
    with pytest.raises(asyncio.CancelledError):
        await leaving


async def test_a_loop_that_ends_leaves_no_call_waiting() -> None:
    doubling = Doubling()
    doubling.may.clear()
    coalescer = Coalescer(doubling)
    before = asyncio.all_tasks()
    calls = [asyncio.ensure_future(coalescer(number)) for number in range(MOST_CALLS + 1)]
    while not doubling.rounds:
        await asyncio.sleep(0)
    (rounds,) = asyncio.all_tasks() - before - set(calls)
    rounds.cancel()  # as the end of the loop does; the last call is not even in the round under way
    async with asyncio.timeout(PATIENCE_SECONDS):
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    doubling.may.set()
    assert await coalescer(5) == 10


@pytest.mark.parametrize("begun", [True, False])
async def test_closing_ends_what_is_under_way_and_what_waits(begun: bool) -> None:
    doubling = Doubling()
    doubling.may.clear()
    coalescer = Coalescer(doubling)
    calls = [asyncio.ensure_future(coalescer(number)) for number in range(MOST_CALLS + 1)]
    while begun and not doubling.rounds:
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    others = asyncio.all_tasks() - set(calls) - {asyncio.current_task()}
    await coalescer.close()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    assert len(others) == 1 and all(task.cancelled() for task in others)
    await coalescer.close()
    doubling.may.set()
    assert await coalescer(5) == 10


async def test_an_error_comes_once_all_calls_have_ended() -> None:
    ended: list[int] = []

    async def call(number: int) -> int:
        for _ in range(number):
            await asyncio.sleep(0)
        ended.append(number)
        if number == 1:
            raise ValueError("the first to end")
        return number

    with pytest.raises(ValueError, match="the first to end"):
        await all_ended(call(number) for number in (1, 2, 3))
    assert ended == [1, 2, 3]
    assert await all_ended(call(number) for number in (3, 2)) == [3, 2]
