"""How a rank other than 0 reads its groups of a batch: from the bus, by id, without taking them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

from jackpot.bus import TrajectoryBus
from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment
from jackpot.errors import BusError
from jackpot.storage.job_storage import payload_place
from jackpot.trajectory import ScoredGroup

LOG = logging.getLogger(__name__)


class RankGroups:
    """Groups that rank 0 has taken; they stay on the bus until a checkpoint holds their effect.

    Args:
        environment: where the bus is.
        job: the job as resolved.
        loop: runs the bus's connection; :meth:`read` is called from another thread.
    """

    def __init__(self, environment: ServiceEnvironment, job: JobSpec, loop: asyncio.AbstractEventLoop) -> None:
        self._environment = environment
        self._job = job
        self._loop = loop
        self._bus: TrajectoryBus | None = None

    def read(self, group_ids: Sequence[str]) -> Mapping[str, ScoredGroup]:
        """Groups by id; those are absent that cannot be read, all of them where the bus does not answer."""
        try:
            return asyncio.run_coroutine_threadsafe(self._fetch(group_ids), self._loop).result()
        except BusError as error:
            LOG.warning("groups cannot be read: %s", error)
            return {}

    async def close(self) -> None:
        """Close the connection."""
        if self._bus is not None:
            await self._bus.close()

    async def _fetch(self, group_ids: Sequence[str]) -> Mapping[str, ScoredGroup]:
        if self._bus is None:
            environment = self._environment
            consumer = f"learner-{environment.instance}"
            payloads = payload_place(self._job, environment.job_id, environment.run_dir)
            bus = await TrajectoryBus.connect(
                environment.redis_url, environment.job_id, self._job.bus, consumer, payloads
            )
            await bus.join()
            self._bus = bus
        try:
            return await self._bus.fetch_scored(group_ids)
        except BusError:
            await self._bus.close()
            self._bus = None  # its state may be another one now
            raise
