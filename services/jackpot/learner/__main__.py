"""``python -m jackpot.learner``: one job's learner, configured by JACKPOT_* variables.

With ``learner.processes`` > 1 this process starts the ranks, by torchrun, and they come here again. Starting them by
hand is the same: ``torchrun --nproc-per-node 2 -m jackpot.learner``.
"""

from __future__ import annotations

import asyncio

from jackpot.compute.ranks.launch import run_ranked_service
from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment


async def _main(environment: ServiceEnvironment, job: JobSpec, stop: asyncio.Event) -> int:
    # Only now: settings are checked before torch loads.
    from jackpot.learner.service import serve

    return await serve(environment, job, stop)


if __name__ == "__main__":
    run_ranked_service("learner", _main, lambda job: job.learner.processes)
