"""``python -m jackpot.orchestrator``: one job's orchestrator, configured by JACKPOT_* variables."""

from __future__ import annotations

import asyncio

from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment
from jackpot.process.service_process import run_service


async def _main(environment: ServiceEnvironment, job: JobSpec, stop: asyncio.Event) -> int:
    # Imported late, so that settings are checked before anything else loads.
    from jackpot.orchestrator.service import serve

    return await serve(environment, job, stop)


if __name__ == "__main__":
    run_service("orchestrator", _main)
