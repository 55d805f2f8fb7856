"""What need not hold up the next step: it is done beside it, one piece at a time, and fails loudly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class BackgroundWork:
    """Runs one piece of blocking work at a time in a thread.

    A piece that failed is raised by whatever is called next: nothing later is begun on top of it.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None

    async def start(self, work: Callable[[], None]) -> None:
        """Begin a piece, once the one before is done; at most one is ever under way.

        Raises:
            Exception: what the piece before met.
        """
        await self.finish()
        self._task = asyncio.create_task(asyncio.to_thread(work))

    async def finish(self) -> None:
        """Wait until nothing is under way.

        Raises:
            Exception: what the last piece met.
        """
        if self._task is not None:
            task, self._task = self._task, None
            await task

    def check(self) -> None:
        """Look without waiting.

        Raises:
            Exception: what the last piece met, if it failed.
        """
        if self._task is not None and self._task.done():
            task, self._task = self._task, None
            task.result()
