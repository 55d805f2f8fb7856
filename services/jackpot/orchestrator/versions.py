"""Watches the newest weight version of each role for all components that wait for one."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping

from jackpot.errors import DeadlineError
from jackpot.storage.weights import WeightStore

UNPUBLISHED = -1
GLANCE_SECONDS = 0.005
"""Seconds between two checks for a replaced file, in stores that support them: a new version starts a batch."""


class VersionWatch:
    """Polls the weight store. Run :meth:`watch` concurrently with the other methods.

    Args:
        store: the job's weights.
        roles: the roles to watch.
        poll_seconds: how often to poll, which reads two small files per role.
    """

    def __init__(self, store: WeightStore, roles: Collection[str], poll_seconds: float = 0.05) -> None:
        self._store = store
        self._newest = dict.fromkeys(roles, UNPUBLISHED)
        self._poll_seconds = poll_seconds
        self._changed = asyncio.Condition()

    def newest(self, role: str) -> int:
        """The newest version of ``role``; −1 before the first."""
        return self._newest[role]

    @property
    def published(self) -> Mapping[str, int]:
        """The newest version of every role that has one."""
        return {role: version for role, version in self._newest.items() if version > UNPUBLISHED}

    async def watch(self) -> None:
        """Keep polling. Never returns."""
        while True:
            marks = {role: self._store.mark(role) for role in self._newest}  # first, so that none is missed
            for role in self._newest:
                manifest = await asyncio.to_thread(self._store.latest, role)
                if manifest is not None and manifest.version > self._newest[role]:
                    self._newest[role] = manifest.version
                    async with self._changed:
                        self._changed.notify_all()
            await self._pause(marks)

    async def _pause(self, marks: Mapping[str, object]) -> None:
        """Wait for a publication if the store can detect one, and for ``poll_seconds`` at most."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._poll_seconds
        while loop.time() < until and all(self._store.mark(role) == mark for role, mark in marks.items()):
            await asyncio.sleep(GLANCE_SECONDS)

    async def wait(self, role: str, version: int, timeout_seconds: float | None = None) -> int:
        """The newest version of ``role`` once it is at least ``version``.

        Raises:
            DeadlineError: that version did not appear in time.
        """
        try:
            async with asyncio.timeout(timeout_seconds), self._changed:
                await self._changed.wait_for(lambda: self._newest[role] >= version)
        except TimeoutError:
            raise DeadlineError(
                f"version {version} of the {role}'s weights", timeout_seconds or 0.0, "Look at the learner's log."
            ) from None
        return self._newest[role]
