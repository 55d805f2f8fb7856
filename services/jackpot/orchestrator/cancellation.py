"""Cancellation that cannot get lost."""

from __future__ import annotations

import asyncio


def heed_cancellation() -> None:
    """Raise CancelledError if the current task was asked to end; for loops around calls to the bus.

    Up to Python 3.11 ``asyncio.wait_for``, by which redis-py sends, drops a cancellation that arrives just as the
    sending is done: a loop that goes on after such a call would never end.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
