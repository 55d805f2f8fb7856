"""The protocol of both clients, independent of their transport: addresses, retries, events over several connections,
errors. No connections here."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from jackpot.client import calls
from jackpot.client.calls import Call, Stream
from jackpot.errors import ApiError

DEFAULT_URL = "http://127.0.0.1:8700"
TIMEOUT_SECONDS = 30.0
ATTEMPTS = 5  # retries of a repeatable request while the server restarts
MOST_FAILED_CONNECTIONS = 4 * ATTEMPTS  # without an event in between
RETRY_SECONDS = 0.5

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a job: ``state``, ``step``, ``evaluation``, ``alarm``, ``scale`` or ``end``."""

    name: str
    data: Mapping[str, Any]
    id: str | None


class Settings:
    """The server's address, token and authority, from the client's arguments or the environment."""

    def __init__(self, url: str | None, token: str | None, ca: Path | None) -> None:
        self.url = (url or os.environ.get("JACKPOT_URL") or DEFAULT_URL).rstrip("/")
        token = token or os.environ.get("JACKPOT_TOKEN")
        self.arguments: dict[str, Any] = {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {token}"} if token else {},
            "timeout": TIMEOUT_SECONDS,
            "verify": ssl.create_default_context(cafile=str(ca)) if ca else True,
            # An outbound proxy must not stand between this machine and itself.
            "trust_env": not self.url.startswith(("http://127.0.0.1", "http://localhost", "http://[::1]")),
        }

    def unreachable(self, error: Exception) -> ApiError:
        """The error if the server does not answer."""
        return ApiError(f"{self.url} does not answer ({error}). Is `jackpot serve` running there? Set JACKPOT_URL.")

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Raise :meth:`unreachable` for a connection that fails inside the ``with``."""
        try:
            yield
        except httpx.TransportError as error:
            raise self.unreachable(error) from error


def attempts(call: Call[T], settings: Settings) -> Generator[float, httpx.Response | httpx.TransportError, T]:
    """A call, repeated while the server restarts. The generator makes no connection itself: it yields the seconds to
    wait before each attempt, receives the attempt's outcome, and returns the parsed answer.

    Raises:
        ApiError: the server refuses, or does not answer.
    """
    pause_seconds = 0.0
    for attempt in range(ATTEMPTS):
        outcome = yield pause_seconds
        is_last = attempt == ATTEMPTS - 1
        if isinstance(outcome, httpx.TransportError):
            # The first attempt fails fast if there is no server at all; a restarting server drops connections.
            if isinstance(outcome, httpx.ConnectError) or is_last:
                raise settings.unreachable(outcome) from outcome
        elif outcome.status_code not in (429, 503) or is_last:
            raise_for(outcome)
            return call.read(outcome)
        pause_seconds = RETRY_SECONDS * 2**attempt
    raise AssertionError("unreachable: the last attempt returns or raises")


def timeout_of(stream: Stream) -> httpx.Timeout:
    """How long a stream may take to answer."""
    return httpx.Timeout(TIMEOUT_SECONDS, read=None if stream.may_be_silent else TIMEOUT_SECONDS)


def raise_for(response: httpx.Response) -> None:
    """Turn a problem document into an error with its message."""
    if response.status_code < 400:
        return
    try:
        problem = dict(response.json())
    except ValueError:
        problem = {}
    lines = [str(problem.get("detail") or f"the server answered {response.status_code}")]
    errors = problem.get("errors") or []
    if errors:
        lines = [_described(error) for error in errors]
    raise ApiError("\n".join(lines), response.status_code, problem)


def _described(error: Mapping[str, Any]) -> str:
    """One of a problem document's errors: field, value, problem, remedy."""
    value = f" = {error['value']!r}" if error.get("value") else ""
    return f"{error['field']}{value}: {error['problem']}. {error['remedy']}"


class EventFollower:
    """A job's events over as many connections as needed: each resumes where the last one broke.

    Args:
        job_id: whose events.
        last_event_id: the last event known; None for all.
        settings: of the client.
    """

    def __init__(self, job_id: str, last_event_id: str | None, settings: Settings) -> None:
        self.over = False  # the last event has come
        self._job_id = job_id
        self._last_id = last_event_id
        self._settings = settings
        self._failures = 0  # since the last event
        self._fields: dict[str, str] = {}

    @property
    def stream(self) -> Stream:
        """The request of the next connection."""
        return calls.events(self._job_id, self._last_id)

    @contextmanager
    def connection(self) -> Iterator[None]:
        """Context of one connection: suppresses its failure, unless there were too many in a row.

        Raises:
            ApiError: the server refuses, or does not answer.
        """
        try:
            yield
        except httpx.TransportError as error:
            self._failures += 1
            if self._failures >= MOST_FAILED_CONNECTIONS:
                raise self._settings.unreachable(error) from error
        except ApiError as error:
            self._failures += 1
            if error.status != 503 or self._failures >= MOST_FAILED_CONNECTIONS:
                raise

    def feed(self, line: str) -> Event | None:
        """Parse a line; returns the event that it completes, if any."""
        if line:
            name, _, value = line.partition(":")
            if name:
                self._fields[name] = value.removeprefix(" ")
            return None
        fields, self._fields = self._fields, {}
        if "data" not in fields:
            return None
        self._last_id = fields.get("id", self._last_id)
        self._failures = 0
        event = Event(fields.get("event", "message"), json.loads(fields["data"]), fields.get("id"))
        self.over = event.name == "end"
        return event
