"""``python -m jackpot.scorer``: the OBRS scoring service, configured by the JACKPOT_* variables."""

from __future__ import annotations

import asyncio

from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment
from jackpot.runtime.process import run_service


async def main(environment: ServiceEnvironment, job: JobSpec, stop: asyncio.Event) -> int:
    """Import what is heavy only now that the settings have been read."""
    from jackpot.scorer.service import serve

    return await serve(environment, job, stop)


if __name__ == "__main__":
    run_service("scorer", main)
