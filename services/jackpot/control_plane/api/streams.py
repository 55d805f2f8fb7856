"""Streams: a job's events as server-sent events, and its logs as they grow."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jackpot.control_plane.backend import Backend
from jackpot.control_plane.observing.observation import LogTail, services
from jackpot.errors import BusError, JobNotFoundError
from jackpot.storage.json_files import JsonLinesReader
from jackpot.storage.run_directory import RunFiles

LOOK_SECONDS = 0.2
HEARTBEAT_SECONDS = 10.0
CURSOR_PATTERN = r"^[0-9]{1,9}(-[0-9]{1,15}){4}$"

# The sources of events: the cursor's field, the event's name, the file.
FILES: Sequence[tuple[str, str, Callable[[RunFiles], Path]]] = (
    ("steps", "step", lambda files: files.metrics),
    ("evaluations", "evaluation", lambda files: files.evaluations),
    ("alarms", "alarm", lambda files: files.alarms),
    ("scalings", "scale", lambda files: files.scalings),
)


@dataclass(slots=True)
class EventCursor:
    """A position in a stream of events: transitions seen, and bytes read of each file. It is each event's id, so that
    a client that reconnects continues exactly where it stopped, even after a restart of the server."""

    transitions: int = 0
    steps: int = 0
    evaluations: int = 0
    alarms: int = 0
    scalings: int = 0

    def __str__(self) -> str:
        return f"{self.transitions}-{self.steps}-{self.evaluations}-{self.alarms}-{self.scalings}"

    @classmethod
    def parse(cls, text: str | None) -> EventCursor:
        """The cursor of an event id; the beginning if the id is not valid."""
        if text is None or re.fullmatch(CURSOR_PATTERN, text) is None:
            return cls()
        return cls(*(int(part) for part in text.split("-")))


class EventStream:
    """A job's events from a cursor on: ``state``, ``step``, ``evaluation``, ``alarm``, ``scale``; ``end`` is the last.

    Args:
        backend: store and run directories.
        job_id: whose events.
        cursor: where to begin.
    """

    def __init__(self, backend: Backend, job_id: str, cursor: EventCursor) -> None:
        self._backend = backend
        self._job_id = job_id
        self._cursor = cursor
        files = RunFiles(backend.scheduler.run_dir(job_id))
        self._tails = {part: JsonLinesReader(file(files), getattr(cursor, part)) for part, _, file in FILES}

    async def events(self) -> AsyncIterator[str]:
        """The events, as text of ``text/event-stream``, until the job is over or the server stops."""
        yield "retry: 1000\n\n"
        sent_at = time.monotonic()
        while not self._backend.stopping.is_set():
            try:
                # Read the state before the files: a job that has ended has written everything.
                ended = (await self._backend.store.get(self._job_id)).state.finished
                news = await self._news()
            except JobNotFoundError:
                yield _event("end", None, {"reason": "the job was deleted"})
                return
            except BusError:
                return  # the client comes back with its Last-Event-ID
            for text in news:
                yield text
                sent_at = time.monotonic()
            if ended and not news:
                yield _event("end", str(self._cursor), {"reason": "the job is over"})
                return
            if time.monotonic() - sent_at > HEARTBEAT_SECONDS:
                yield ": still here\n\n"
                sent_at = time.monotonic()
            if not news:
                await asyncio.sleep(LOOK_SECONDS)

    async def _news(self) -> list[str]:
        """New events in the order in which they happened."""
        transitions = await self._backend.store.transitions(self._job_id, self._cursor.transitions)
        # (time, what the cursor becomes, name, data)
        news: list[tuple[float, tuple[str, int], str, Any]] = [
            (
                transition.time.timestamp(),
                ("transitions", self._cursor.transitions + index),
                "state",
                transition.model_dump(mode="json"),
            )
            for index, transition in enumerate(transitions, start=1)
        ]
        for name, event, _ in FILES:
            news += [(float(row.get("time") or 0.0), (name, end), event, row) for row, end in self._tails[name].read()]
        texts = []
        for _, (part, position), event, data in sorted(news, key=lambda entry: entry[0]):
            setattr(self._cursor, part, max(position, getattr(self._cursor, part)))
            texts.append(_event(event, str(self._cursor), data))
        return texts


def _event(name: str, cursor: str | None, data: Any) -> str:
    identity = "" if cursor is None else f"id: {cursor}\n"
    return f"event: {name}\n{identity}data: {json.dumps(_finite(data))}\n\n"


def _finite(data: Any) -> Any:
    """NaN and infinity, which JSON lacks, become null."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return None if isinstance(data, float) and data - data != 0 else data


async def follow_logs(
    backend: Backend, job_id: str, service: str | None, lines: int, follow: bool
) -> AsyncIterator[str]:
    """Logs of a job's processes, from their last lines on. With several processes each line begins with its process.

    Ends once the job is over; without ``follow``, at once.
    """
    run_dir = backend.scheduler.run_dir(job_id)
    tails: dict[str, LogTail] = {}
    while not backend.stopping.is_set():
        try:
            over = not follow or (await backend.store.get(job_id)).state.finished
        except (JobNotFoundError, BusError):
            over = True
        for name in services(run_dir) if service is None else [service]:
            if name not in tails:  # a job that waits for a slot has no logs yet
                tails[name] = LogTail(RunFiles(run_dir).log(name), lines)
        texts = {name: tail.read() for name, tail in tails.items()}
        for name, text in texts.items():
            if text:
                yield text if service is not None else "".join(f"{name} | {line}\n" for line in text.splitlines())
        if over and not any(texts.values()):
            return
        if not any(texts.values()):
            await asyncio.sleep(LOOK_SECONDS)
