"""Everything behind the API: the store and its server, the scheduler, the tokens."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
from collections.abc import AsyncIterator

from jackpot.bus.server import EmbeddedServer
from jackpot.control_plane.jobs.redis_job_store import RedisJobStore
from jackpot.control_plane.jobs.scheduler import Scheduler
from jackpot.control_plane.service_metrics import ServiceMetrics
from jackpot.control_plane.settings import ServeSettings
from jackpot.control_plane.tokens import TokenFile
from jackpot.errors import ConfigError, JackpotError

LOG = logging.getLogger(__name__)

WATCH_SECONDS = 0.2
SILENCE_SECONDS = 15.0  # a scheduler idle for longer is not ready


class Backend:
    """One server's state. Use it inside :meth:`open`.

    Args:
        settings: of the server.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.tokens = TokenFile(settings.tokens)
        self.metrics = ServiceMetrics()
        self.stopping = asyncio.Event()
        self.store: RedisJobStore
        self.scheduler: Scheduler

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Start the store's server unless it runs elsewhere, and the scheduler. Call it on the main thread.

        Raises:
            ConfigError: another server holds the data directory.
            JackpotError: the store cannot be used.
        """
        directory = self.settings.data_dir
        (directory / "runs").mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = -1
        embedded = None if self.settings.store_url else EmbeddedServer(directory / "store", appendfsync="always")
        tasks: list[asyncio.Task[None]] = []
        try:
            lock = self._hold()
            if embedded is not None:
                await embedded.start()
            self.store = RedisJobStore(self.settings.store_url or (embedded.url if embedded else ""))
            await self.store.check_server()
            self.scheduler = Scheduler(
                self.store, directory / "runs", self.settings.policy, self.settings.launcher_choice
            )
            tasks.append(asyncio.create_task(self.scheduler.run()))
            if embedded is not None:
                tasks.append(asyncio.create_task(_keep_up(embedded, self.stopping)))
            yield
        finally:
            self.stopping.set()
            if tasks:
                self.scheduler.stop()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self.store.close()
            if embedded is not None:
                await embedded.stop()
            if lock >= 0:
                os.close(lock)

    async def readiness(self) -> str | None:
        """Why the server cannot accept jobs now, or None."""
        try:
            await asyncio.wait_for(self.store.ping(), 2.0)
        except (JackpotError, TimeoutError):
            return "the job store does not answer"
        if self.scheduler.silent_seconds > SILENCE_SECONDS:
            return "the scheduler does not run"
        return None

    def _hold(self) -> int:
        lock = os.open(self.settings.data_dir / "serve.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            remedy = "Stop it first, or choose another --data-dir."
            raise ConfigError("--data-dir", str(self.settings.data_dir), "is served already", remedy) from None
        return lock


async def _keep_up(server: EmbeddedServer, stopping: asyncio.Event) -> None:
    """Restart the store's server when it dies; its data, socket and password stay."""
    while not stopping.is_set():
        await asyncio.sleep(WATCH_SECONDS)
        if server.poll() is None:
            continue
        LOG.error("the job store's server died; restarting it", extra={"status": server.poll()})
        try:
            await server.start()
        except JackpotError as error:
            LOG.error("the job store's server cannot be restarted: %s", error)
            await asyncio.sleep(1.0)
