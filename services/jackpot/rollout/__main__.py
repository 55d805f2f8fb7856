"""``python -m jackpot.rollout``: one rollout replica, configured by JACKPOT_* variables."""

from __future__ import annotations

import asyncio

from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment
from jackpot.process.service_process import run_service


async def _main(environment: ServiceEnvironment, job: JobSpec, stop: asyncio.Event) -> int:
    # Imported only now: settings are checked before torch loads.
    from jackpot.rollout.service import serve

    return await serve(environment, job, stop)


if __name__ == "__main__":
    run_service("rollout", _main)
