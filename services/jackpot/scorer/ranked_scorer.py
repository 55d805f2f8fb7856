"""The ranks that score together, and the models that each holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jackpot.compute.common_vocabulary import common_vocabulary
from jackpot.compute.models import resolve_device, set_threads
from jackpot.compute.ranks.group import SOLO, Ranks, join_ranks
from jackpot.compute.ranks.orders import Orders
from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment
from jackpot.scorer.engine import Scorer
from jackpot.scorer.rank_leader import Follower, LeadPolicy, LeadScorer
from jackpot.scorer.target import ActorVersions, HeldPolicy, TargetPolicy
from jackpot.scoring.group_scorer import GroupScorer
from jackpot.storage.weights import WeightStore


@dataclass(frozen=True, slots=True)
class RankedScorer:
    """This process as one rank of a scorer."""

    ranks: Ranks = SOLO
    orders: Orders | None = None  # on rank 0, if there are several ranks

    def make_scorer(self, job: JobSpec, store: WeightStore) -> tuple[TargetPolicy, Scorer]:
        """Load the models; returns the target policy and its scorer, whole or this rank's part.

        Raises:
            ConfigError: a model cannot be loaded or used.
        """
        held = HeldPolicy(job.policy, job.scorer.device, self.ranks, common_vocabulary(job))
        policy = held if self.orders is None else LeadPolicy(held, self.ranks, self.orders)
        target = TargetPolicy(policy, store, initial_lambda(job), job.policy_versions_held)
        scorer = GroupScorer(job, target, self._actors(job, store), self.ranks)
        if self.orders is None:
            return target, scorer
        return target, LeadScorer(scorer, job.bus.max_payload_bytes, self.orders)

    def make_follower(self, job: JobSpec, store: WeightStore) -> Follower:
        """The work of a rank other than 0. Errors as :meth:`make_scorer`."""
        target, scorer = self.make_scorer(job, store)
        return Follower(job, target, scorer, self.ranks, job.policy_versions_held)

    def _actors(self, job: JobSpec, store: WeightStore) -> ActorVersions | None:
        if not job.scorer_runs_actor:
            return None
        return ActorVersions(
            job.rollout_model,
            job.rollout_role,
            store,
            job.scorer.device,
            num_held=job.actor_versions_held,
            ranks=self.ranks,
            vocabulary=common_vocabulary(job),
        )


ALONE = RankedScorer()
"""One process with whole models."""


def join_ranked_scorer(environment: ServiceEnvironment, job: JobSpec) -> RankedScorer:
    """This process among the ranks of its scorer, once all have joined; :data:`ALONE` if there is one process.

    Raises:
        ConfigError: the device or the number of ranks cannot work.
    """
    config = job.scorer
    set_threads(max(1, environment.threads // config.processes) if environment.threads else 0)
    if config.processes == 1:
        return ALONE
    ranks = join_ranks("scorer", config, resolve_device(config.device, field="scorer.device"))
    if ranks.device is not None and ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    return RankedScorer(ranks, Orders(ranks, config.collective_timeout_seconds) if ranks.rank == 0 else None)


def initial_lambda(job: JobSpec) -> float:
    """λ for versions that carry none."""
    obrs = job.algorithm.correction.obrs
    return obrs.initial_lambda if obrs else 1.0
