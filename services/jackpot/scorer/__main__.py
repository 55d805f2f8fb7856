"""``python -m jackpot.scorer``: the OBRS scoring service, configured by the JACKPOT_* variables.

With ``scorer.processes`` > 1 this process starts the ranks, by torchrun, and they come here again.
"""

from __future__ import annotations

import asyncio

from jackpot.compute.ranks.launch import run_ranked_service
from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment
from jackpot.errors import ConfigError, JackpotError


async def main(environment: ServiceEnvironment, job: JobSpec, stop: asyncio.Event) -> int:
    """Import what is heavy only now that the settings have been read."""
    if not job.scorer_replicas:
        problem = "leaves the scores to the learner, so that there is nothing to do for a scorer"
        raise ConfigError("scorer.reuse_reference", True, problem, "Start none, or leave reuse_reference out.")
    from jackpot.compute.ranks.group import leave_ranks
    from jackpot.scorer.ranked_scorer import meet_members
    from jackpot.scorer.service import serve, weight_store

    members = await asyncio.to_thread(meet_members, environment, job)
    code = 1
    try:
        if members.ranks.rank == 0:
            code = await serve(environment, job, stop, members=members)
        else:
            # A signal stops rank 0, which stops this one when it is done.
            follower = await asyncio.to_thread(members.make_follower, job, weight_store(environment, job))
            code = await asyncio.to_thread(follower.run)
    except JackpotError as error:
        code = error.exit_code
        raise
    finally:
        if members.orders is not None:
            await asyncio.to_thread(members.orders.dismiss, code)
        leave_ranks()
    return code


if __name__ == "__main__":
    run_ranked_service("scorer", main, lambda job: job.scorer.processes)
