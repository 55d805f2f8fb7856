"""Background work that runs concurrently with the next step, one piece at a time. Its failures are raised."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class BackgroundWork:
    """Runs one piece of blocking work at a time in a thread.

    The next call raises a failed piece's error, so that nothing is started after a failure.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    async def start(self, work: Callable[[], None]) -> None:
        """Start a piece once the previous one is done; at most one runs at a time.

        Raises:
            Exception: the previous piece's error.
        """
        await self.finish()
        self._task = asyncio.create_task(asyncio.to_thread(work))

    async def finish(self) -> None:
        """Wait until no piece is running.

        Raises:
            Exception: the last piece's error.
        """
        if self._task is not None:
            task, self._task = self._task, None
            await task

    def check(self) -> None:
        """Check without waiting.

        Raises:
            Exception: the last piece's error, if it failed.
        """
        if self._task is not None and self._task.done():
            task, self._task = self._task, None
            task.result()
