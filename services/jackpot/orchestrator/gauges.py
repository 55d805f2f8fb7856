"""Figures about the whole job that only the orchestrator can show, read once a second."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from pathlib import Path

from jackpot.bus import BusReadings, Ledger
from jackpot.orchestrator.replicas import ReplicaPool
from jackpot.orchestrator.versions import VersionWatch
from jackpot.telemetry import Metrics

LOOK_SECONDS = 1.0


class JobGauges:
    """Depths and ages of the bus, the ledger, the bus server's memory, free disk, versions, replicas.

    Args:
        bus_readings: the readings of an open bus.
        versions: the newest weight versions.
        replicas: the rollout replicas.
        run_dir: the run directory.
        metrics: shows the figures.
    """

    def __init__(
        self, bus_readings: BusReadings, versions: VersionWatch, replicas: ReplicaPool, run_dir: Path, metrics: Metrics
    ) -> None:
        self._bus_readings = bus_readings
        self._versions = versions
        self._replicas = replicas
        self._run_dir = run_dir
        self._metrics = metrics

    async def run(self) -> None:
        """Read the figures until cancelled.

        Raises:
            BusError: the bus failed.
        """
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Read and show all figures once. Errors as in :meth:`run`."""
        metrics = self._metrics
        metrics.observe_replicas(self._replicas.num_ready, self._replicas.num_wanted)
        metrics.observe_newest_weights(self._versions.published)
        # Outside the event loop: a network volume may be slow.
        volume = await asyncio.to_thread(shutil.disk_usage, self._run_dir)
        metrics.observe_run_volume(volume.free, volume.total)
        metrics.observe_bus(await self._bus_readings.depths())
        metrics.observe_bus_ages(await self._bus_readings.oldest_seconds())
        metrics.observe_ledger(_by_state(await self._bus_readings.ledger()))
        memory = await self._bus_readings.server_memory()
        if memory is not None:
            metrics.observe_bus_server(*memory)


def _by_state(ledger: Ledger) -> Mapping[str, int]:
    dropped = sum(ledger.dropped.values())
    return {"dispatched": ledger.dispatched, "trained": ledger.trained, "dropped": dropped, "open": ledger.open}
