"""``python -m jackpot.scorer``: one scorer of a job, configured by JACKPOT_* variables.

With ``scorer.processes`` > 1 this process starts the ranks with torchrun, and each of them runs this module again.
"""

from __future__ import annotations

import asyncio

from jackpot.compute.ranks.launch import run_ranked_service
from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment


async def _main(environment: ServiceEnvironment, job: JobSpec, stop: asyncio.Event) -> int:
    # Imported late, so that settings are checked before torch loads.
    from jackpot.scorer.service import serve

    return await serve(environment, job, stop)


if __name__ == "__main__":
    run_ranked_service("scorer", _main, lambda job: job.scorer.processes)
