"""Keeps an engine at the newest weights of its role in the weight store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from jackpot.errors import DeadlineError, WeightError, WeightMissingError
from jackpot.rollout.engine import RolloutEngine
from jackpot.storage.weight_probe import WeightProbe
from jackpot.storage.weights import WeightStore
from jackpot.trajectory import Role

LOG = logging.getLogger(__name__)

# A refused version is retried after this long, since its publisher may repair it. Hashing a whole version at every
# poll would cost too much.
RETRY_SECONDS = 2.0


class WeightFollower:
    """Polls the store, and has the engine load newer versions. Run :meth:`follow` as a task.

    A version that is damaged or does not fit is refused, logged and counted. The engine then loads the newest intact
    version that is newer than its own, if there is one.

    Args:
        engine: the engine to keep up to date.
        store: the job's weight store.
        role: whose versions to follow.
        poll_seconds: how often to look.
        on_demand: poll only while a caller waits for a version. For engines with few requests, since each version is
            read and verified in full.
        on_loaded: receives the version held now, and the seconds that verifying and loading took.
        on_refused: receives each refused version, once.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        store: WeightStore,
        role: Role,
        poll_seconds: float,
        on_demand: bool = False,
        on_loaded: Callable[[int, float], object] = lambda version, seconds: None,
        on_refused: Callable[[int], object] = lambda version: None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._role = role
        self._poll_seconds = poll_seconds
        self._on_demand = on_demand
        self._num_waiting = 0
        self._on_loaded = on_loaded
        self._on_refused = on_refused
        self._refused_until: dict[int, float] = {}  # on the monotonic clock
        self._look_now = asyncio.Event()
        self._changed = asyncio.Condition()

    async def follow(self) -> NoReturn:
        """Follow until cancelled."""
        while True:
            resting = self._on_demand and not self._num_waiting
            if not resting:
                await self._look()
            with suppress(TimeoutError):
                async with asyncio.timeout(None if resting else self._poll_seconds):
                    await self._look_now.wait()
            self._look_now.clear()

    async def wait_for(self, min_version: int, timeout_seconds: float) -> int:
        """The version held, as soon as it is at least ``min_version``. Polls the store at once.

        Raises:
            DeadlineError: no such version could be loaded in time.
        """
        if self._engine.version >= min_version:
            return self._engine.version
        self._look_now.set()
        self._num_waiting += 1
        try:
            async with asyncio.timeout(timeout_seconds), self._changed:
                await self._changed.wait_for(lambda: self._engine.version >= min_version)
        except TimeoutError:
            held = f"version {self._engine.version} is held" if self._engine.version >= 0 else "none is held"
            refused = f"; refused: {sorted(self._refused_until)}" if self._refused_until else ""
            raise DeadlineError(
                f"version {min_version} of the {self._role}'s weights ({held}{refused})",
                timeout_seconds,
                "Look at the logs of this server and of the learner.",
            ) from None
        finally:
            self._num_waiting -= 1
        return self._engine.version

    async def took(self, version: int, seconds: float) -> None:
        """Notify waiting callers that the engine holds a version that did not come from the store."""
        LOG.info("weights received", extra={"version": version, "seconds": seconds})
        self._on_loaded(version, seconds)
        async with self._changed:
            self._changed.notify_all()

    async def newest(self) -> int:
        """The newest version in the store; −1 if there is none yet.

        Raises:
            WeightError: the store is damaged.
        """
        manifest = await asyncio.to_thread(self._store.latest, self._role)
        return -1 if manifest is None else manifest.version

    async def _look(self) -> None:
        """Load the newest version that can be loaded, if it is newer than the one held."""
        try:
            newest = await self.newest()
        except WeightError as error:
            LOG.warning("version %d stays in use: %s", self._engine.version, error)
            return
        if newest <= self._engine.version:
            return
        if await self._load(newest):
            return
        # Any version newer than the one held is better than waiting for a repair.
        for version in reversed(await asyncio.to_thread(self._store.versions, self._role)):
            if version <= self._engine.version or (version < newest and await self._load(version)):
                return

    async def _load(self, version: int) -> bool:
        started = time.monotonic()
        if started < self._refused_until.get(version, 0.0):
            return False
        try:
            manifest = await asyncio.to_thread(self._store.manifest, self._role, version)
            directory = await asyncio.to_thread(self._store.open, self._role, version)
            await self._engine.load_weights(version, directory, WeightProbe.from_metadata(manifest.metadata))
        except (WeightMissingError, FileNotFoundError):
            LOG.info("version %d was pruned before it was loaded", version)
            return False
        except WeightError as error:
            if version not in self._refused_until:
                LOG.error("version %d is refused, version %d stays in use: %s", version, self._engine.version, error)
                self._on_refused(version)
            self._refused_until[version] = time.monotonic() + RETRY_SECONDS
            return False
        seconds = time.monotonic() - started
        LOG.info("weights loaded", extra={"version": version, "seconds": seconds})
        self._refused_until = {v: until for v, until in self._refused_until.items() if v > version}
        self._on_loaded(version, seconds)
        async with self._changed:
            self._changed.notify_all()
        return True
