"""Groups that the learner scores (``scorer.reuse_reference``): checked as a scorer would, and passed on."""

from __future__ import annotations

from dataclasses import replace

from jackpot.compute.common_vocabulary import common_vocabulary
from jackpot.compute.model_inputs import check_group
from jackpot.config import JobSpec
from jackpot.trajectory import Group, ScoredGroup, deferred


class Deferral:
    """Gives groups the form of scored groups with placeholder scores: every token accepted, Z = 1.

    No such group is stale: no rollout is older than the start of its batch allows (``min_version``), and no batch
    starts without its groups.

    Args:
        job: the job as resolved.

    Raises:
        ConfigError: a model's config.json does not state the vocabulary's size.
    """

    def __init__(self, job: JobSpec) -> None:
        self._vocabulary = common_vocabulary(job)
        obrs = job.algorithm.correction.obrs
        self._with_topk = obrs is not None and obrs.needs_candidates

    def defer(self, group: Group, policy_version: int) -> ScoredGroup:
        """Pass a group on; the actor's top-k stays if the learner needs it for Z.

        Args:
            group: the group with its rewards.
            policy_version: the newest version of the policy.

        Raises:
            PayloadError: the group's arrays do not fit the policy or the job.
        """
        check_group(group, self._vocabulary, with_topk=self._with_topk)
        return deferred(group if self._with_topk else _without_topk(group), policy_version)


def _without_topk(group: Group) -> Group:
    trajectories = tuple(replace(t, topk_ids=None, topk_logprobs=None) for t in group.trajectories)
    return replace(group, trajectories=trajectories)
