"""What both clients do between a call and its answer, without any connection."""

from __future__ import annotations

import json

import httpx
import pytest

from jackpot.client import calls
from jackpot.client.conversation import MOST_FAILED_CONNECTIONS, EventFollower, Settings, attempts
from jackpot.errors import ApiError

SETTINGS = Settings("http://server", token=None, ca=None)
BUSY = httpx.Response(503, json={"detail": "the server is starting"})


def pauses_until_answer(outcomes: list[httpx.Response | httpx.TransportError]) -> tuple[list[float], dict]:
    """The pauses before each attempt, and the answer, when the attempts end so."""
    exchange = attempts(calls.ledger("job-1", entries=0), SETTINGS)
    pauses = [next(exchange)]
    try:
        for outcome in outcomes:
            pauses.append(exchange.send(outcome))
    except StopIteration as done:
        return pauses, done.value
    raise AssertionError("no answer")


def test_a_call_is_repeated_with_growing_pauses_while_the_server_restarts() -> None:
    outcomes = [BUSY, httpx.ReadError("reset"), httpx.Response(429), BUSY, httpx.Response(200, json={"open": 3})]
    assert pauses_until_answer(outcomes) == ([0.0, 0.5, 1.0, 2.0, 4.0], {"open": 3})


def test_the_fifth_failure_is_the_last() -> None:
    with pytest.raises(ApiError, match="the server is starting") as refused:
        pauses_until_answer([BUSY] * 5)
    assert refused.value.status == 503
    with pytest.raises(ApiError, match="http://server does not answer"):
        pauses_until_answer([httpx.ReadError("reset")] * 5)


def test_a_refusal_and_a_server_that_is_not_there_are_reported_at_once() -> None:
    with pytest.raises(ApiError, match="no such job"):
        pauses_until_answer([httpx.Response(404, json={"detail": "no such job"})])
    with pytest.raises(ApiError, match="does not answer"):
        pauses_until_answer([httpx.ConnectError("refused")])


def test_pages_follow_one_another_with_the_same_filters() -> None:
    first = calls.page(["running"], {"team": "a"})
    second = calls.page_after(first, calls.JobList(jobs=[], next_cursor="c1"))
    assert second is not None
    assert second.params == {"limit": 100, "label": ["team=a"], "state": ["running"], "cursor": "c1"}
    assert calls.page_after(second, calls.JobList(jobs=[], next_cursor=None)) is None


def feed(follower: EventFollower, name: str, event_id: str) -> None:
    for line in (": a comment", f"event: {name}", f"id: {event_id}", f"data: {json.dumps({'step': 1})}"):
        assert follower.feed(line) is None
    event = follower.feed("")
    assert event is not None and (event.name, event.data, event.id) == (name, {"step": 1}, event_id)


def test_a_new_connection_goes_on_after_the_last_event() -> None:
    follower = EventFollower("job-1", None, SETTINGS)
    assert follower.stream == calls.Stream("/v1/jobs/job-1/events")
    feed(follower, "step", "7")
    assert follower.stream.headers == {"Last-Event-ID": "7"} and not follower.over
    feed(follower, "end", "8")
    assert follower.over


def test_lost_connections_are_taken_up_again_until_too_many_fail_in_a_row() -> None:
    follower = EventFollower("job-1", None, SETTINGS)
    for _ in range(MOST_FAILED_CONNECTIONS - 1):
        with follower.connection():
            raise httpx.ReadError("reset")
    feed(follower, "step", "1")  # it works again: the count begins at 0
    for _ in range(MOST_FAILED_CONNECTIONS - 1):
        with follower.connection():
            raise ApiError("the server is starting", 503)
    with pytest.raises(ApiError, match="does not answer"), follower.connection():
        raise httpx.ReadError("reset")


def test_a_refused_event_stream_ends_at_once() -> None:
    follower = EventFollower("job-1", None, SETTINGS)
    with pytest.raises(ApiError, match="no such job"), follower.connection():
        raise ApiError("no such job", 404)
