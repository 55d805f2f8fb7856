"""Which rollout replicas a job has just now: those it began with, and those that joined it since."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from jackpot.orchestrator.replicas import ReplicaPool
from jackpot.process.scaling import announced_rollouts, wanted_replicas

LOG = logging.getLogger(__name__)

LOOK_SECONDS = 0.5


class RolloutMembership:
    """Keeps a pool to the replicas that the job should have.

    Instances from 0 on belong to the job, as many as are wanted. One beyond them is asked for nothing more from the
    moment that this sees the new number, before its process is told to end: what it has under way it finishes.

    Args:
        pool: the rollout replicas.
        run_dir: of the job: the number wanted, and what replicas announce.
        fixed: addresses of the replicas that the job began with, by instance.
    """

    def __init__(self, pool: ReplicaPool, run_dir: Path, fixed: Sequence[str]) -> None:
        self._pool = pool
        self._run_dir = run_dir
        self._fixed = tuple(fixed)

    async def follow(self) -> None:
        """Look again and again. Never returns."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Bring the pool up to date once."""
        # Off the event loop: a network volume may take its time.
        wanted, addresses = await asyncio.to_thread(self._read)
        if wanted != self._pool.num_wanted:
            LOG.info("rollout replicas wanted", extra={"wanted": wanted, "before": self._pool.num_wanted})
        self._pool.use(addresses, wanted)

    def _read(self) -> tuple[int, list[str]]:
        wanted = wanted_replicas(self._run_dir) or len(self._fixed)
        known = announced_rollouts(self._run_dir) | dict(enumerate(self._fixed))
        return wanted, [address for instance, address in sorted(known.items()) if instance < wanted]
