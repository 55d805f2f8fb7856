"""Tracks a job's rollout replicas: those it started with and those that joined later."""

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

    The job has the wanted number of instances, counted from 0. Once this class sees a smaller number, it sends no more
    requests to the instances beyond it, before their processes are asked to stop. They finish their running requests.

    Args:
        pool: the rollout replicas.
        run_dir: the job's run directory, with the wanted number and the addresses that replicas announce.
        fixed: addresses of the replicas that the job started with, by instance.
    """

    def __init__(self, pool: ReplicaPool, run_dir: Path, fixed: Sequence[str]) -> None:
        self._pool = pool
        self._run_dir = run_dir
        self._fixed = tuple(fixed)

    async def follow(self) -> None:
        """Keep the pool up to date. Never returns."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Bring the pool up to date once."""
        # Outside the event loop: a network volume may be slow.
        wanted, addresses = await asyncio.to_thread(self._read)
        if wanted != self._pool.num_wanted:
            LOG.info("rollout replicas wanted", extra={"wanted": wanted, "before": self._pool.num_wanted})
        self._pool.use(addresses, wanted)

    def _read(self) -> tuple[int, list[str]]:
        wanted = wanted_replicas(self._run_dir) or len(self._fixed)
        known = announced_rollouts(self._run_dir) | dict(enumerate(self._fixed))
        return wanted, [address for instance, address in sorted(known.items()) if instance < wanted]
