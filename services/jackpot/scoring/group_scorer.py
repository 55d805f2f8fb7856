"""Turns groups into scored groups: flattens them, divides them among ranks, scores them with
:mod:`jackpot.scoring.score`, and splits the scores by trajectory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from transformers import PreTrainedModel

from jackpot.compute import varlen
from jackpot.compute.model_inputs import check_group
from jackpot.compute.pass_layout import layout_of
from jackpot.compute.ranks.group import SOLO, Ranks
from jackpot.compute.ranks.partition import balanced_shares, plan_share
from jackpot.compute.ranks.sharding import release
from jackpot.config import JobSpec
from jackpot.errors import ScoringError
from jackpot.scoring.batch import SequenceSlice, parts_by_version, sequences_of, token_arrays
from jackpot.scoring.passes import ModelPasses, ScoringRule, siblings_by_prompt
from jackpot.scoring.score import ExactFigures, Scores, score_tokens
from jackpot.trajectory import EXACT_KL, Group, ScoredGroup, TokenScores, Trajectory, deferred

LOG = logging.getLogger(__name__)

NO_NORMALIZER = "none"
"""Stamped on groups where the correction has no Z."""


class Target(Protocol):
    """The target policy in its present version: :class:`jackpot.scorer.target.TargetPolicy` in the service."""

    @property
    def model(self) -> PreTrainedModel:
        """θ."""

    @property
    def version(self) -> int | None:
        """The version of its weights; None before the first."""

    @property
    def obrs_lambda(self) -> float:
        """The λ published with that version."""

    @property
    def vocabulary(self) -> int:
        """V, the number of token ids."""


class Actors(Protocol):
    """The actor at past versions: :class:`jackpot.scorer.target.ActorVersions` in the service."""

    def at(self, version: int) -> PreTrainedModel:
        """The actor with the weights of ``version``, until the next call.

        Raises:
            WeightMissingError: that version no longer exists.
        """


_TrajectoryScores = tuple[TokenScores, list[float]]
"""With KL before and after OBRS, summed over its tokens, where whole rows were read; else an empty list."""


class GroupScorer:
    """Scores groups with the target policy in its present version.

    Args:
        job: the job as resolved.
        target: the target policy.
        actors: the actor at the versions that sampled; required where ``job.scorer_runs_actor``.
        ranks: the processes that score together, over which the models are sharded. Each runs its share of the
            trajectories. All must be called with the same groups at the same time, and all receive all scores.
        has_varlen: whether torch has the variable-length attention kernel. The target's model then uses it, unless the
            job never packs.
    """

    def __init__(
        self,
        job: JobSpec,
        target: Target,
        actors: Actors | None = None,
        ranks: Ranks = SOLO,
        has_varlen: varlen.HasKernel = varlen.is_available,
    ) -> None:
        self._obrs = job.algorithm.correction.obrs
        self._with_topk = self._obrs is not None and self._obrs.needs_candidates
        # Where the learner computes the scores that count.
        self._keeps_topk = self._obrs is not None and (self._obrs.target == "policy" or job.scorer.reuse_reference)
        self._job = job
        self._target = target
        self._actors = actors if job.scorer_runs_actor else None
        self._ranks = ranks
        device, models = ranks.device or target.model.device, [(target.model, target.model.dtype)]
        self._layout = layout_of(job.scorer.packing, models, device, ranks, has_varlen)
        release(target.model)

    def check(self, groups: Sequence[Group]) -> None:
        """Refuse groups that cannot be scored, before computing anything. Errors as :meth:`score_groups`."""
        if self._target.version is None:
            raise ScoringError("no version of the policy's weights is loaded yet. Wait until the scorer is ready.")
        for group in groups:
            check_group(group, self._target.vocabulary, with_topk=self._with_topk)

    def score_groups(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """Score groups, all with one version of the policy. A group's scores do not depend on the other groups.

        Raises:
            PayloadError: a group's arrays do not fit the model or the job.
            ScoringError: a score is not finite, or no policy version is loaded yet.
            WeightMissingError: an actor version that sampled no longer exists.
            WeightCorruptError: an actor version that sampled is damaged.
        """
        self.check(groups)
        # Trajectories with the same temperature and k are scored together.
        alike: dict[tuple[float, int], list[Group]] = {}
        for group in groups:
            by_k: dict[int, list[Trajectory]] = {}
            for trajectory in group.trajectories:
                k = trajectory.topk_ids.shape[1] if self._with_topk and trajectory.topk_ids is not None else 0
                by_k.setdefault(k, []).append(trajectory)
            for k, of_k in by_k.items():
                alike.setdefault((group.temperature, k), []).append(replace(group, trajectories=tuple(of_k)))
        scores_by_trajectory: dict[int, _TrajectoryScores] = {}
        for (temperature, _), members in alike.items():
            trajectories = [trajectory for group in members for trajectory in group.trajectories]
            scores = self._score(members, temperature)
            scores_by_trajectory.update(
                (id(trajectory), of_trajectory) for trajectory, of_trajectory in zip(trajectories, scores, strict=True)
            )
        return [self._scored(group, [scores_by_trajectory[id(t)] for t in group.trajectories]) for group in groups]

    def _scored(self, group: Group, of_group: Sequence[_TrajectoryScores]) -> ScoredGroup:
        """The group as the learner receives it: without data that is no longer needed, with its exact divergences."""
        assert self._target.version is not None
        group = group if self._keeps_topk else _without_topk(group)
        if any(exact_kl for _, exact_kl in of_group):
            sums = [sum(values) for values in zip(*(exact_kl for _, exact_kl in of_group), strict=True)]
            group = replace(group, metadata={**group.metadata, EXACT_KL: sums})
        return ScoredGroup(
            group=group,
            scores=tuple(scores for scores, _ in of_group),
            obrs_lambda=self._target.obrs_lambda,
            policy_version=self._target.version,
            normalizer=self._obrs.normalizer if self._obrs else NO_NORMALIZER,
        )

    def _score(self, groups: Sequence[Group], temperature: float) -> list[_TrajectoryScores]:
        """The scores of each trajectory; all have the same temperature and k. A collective."""
        groups = groups if self._with_topk else [_without_topk(group) for group in groups]
        sequences = sequences_of(groups)
        # The shares depend on the trajectories alone, so every rank knows the share of every other.
        lengths = [sequence.num_inputs for sequence in sequences]
        shares = balanced_shares(lengths, self._ranks.size)
        attention = self._layout.attention
        passes = plan_share(
            lengths,
            shares,
            self._ranks.rank,
            self._job.scorer.max_batch_tokens,
            packed=self._layout.packed,
            siblings=None if attention is None else siblings_by_prompt(sequences, attention),
        )
        scored = score_tokens(
            token_arrays([deferred(group, 0) for group in groups], np.zeros(sequences[-1].end)),
            ModelPasses(self._target.model, sequences, passes, self._layout.states),
            ScoringRule.of_job(self._job, temperature),
            self._target.obrs_lambda,
            None if self._actors is None else self._actor_passes(self._actors, groups, sequences, shares),
            self._ranks,
        )
        release(self._target.model)
        return [self._cut(scored, sequence) for sequence in sequences]

    def _actor_passes(
        self,
        actors: Actors,
        groups: Sequence[Group],
        sequences: Sequence[SequenceSlice],
        shares: Sequence[Sequence[int]],
    ) -> Iterator[ModelPasses]:
        """The actor at each version that sampled, each part on its trajectory's rank. The parts are not packed: the
        actor's model may lack the attention for it."""
        for version, parts in parts_by_version(groups, sequences).items():
            part_indices = [
                [index for index, (number, _) in enumerate(parts) if number in share] for share in map(set, shares)
            ]
            lengths = [part.num_inputs for _, part in parts]
            passes = plan_share(lengths, part_indices, self._ranks.rank, self._job.scorer.max_batch_tokens)
            yield ModelPasses(actors.at(version), [part for _, part in parts], passes)

    def _cut(self, scored: Scores, sequence: SequenceSlice) -> _TrajectoryScores:
        where = slice(sequence.start, sequence.end)
        names = {"target_logprobs": "reference_logprobs", "mask": "mask"} | {
            name: name for name in ("acceptance_probs", "normalizer_head", "normalizer_tail", "topk_mass")
        }
        arrays = {name: getattr(scored.tokens, column)[where].numpy().copy() for name, column in names.items()}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ScoringError(
                f"trajectory {sequence.trajectory_id}: its scores under policy version "
                f"{self._target.version} are not finite. Look for a diverged loss in the learner's log."
            )
        scores = TokenScores(**arrays | {"mask": arrays["mask"].astype(np.bool_)})
        return scores, [] if scored.exact is None else _summed_kl(scored.exact, where)


def _summed_kl(exact: ExactFigures, where: slice) -> list[float]:
    return [float(kl[where].numpy().sum(dtype=np.float64)) for kl in (exact.kl_before, exact.kl_after)]


def _without_topk(group: Group) -> Group:
    """Top-k makes up most of a group's bytes, and nothing needs it after scoring."""
    trajectories = tuple(replace(t, topk_ids=None, topk_logprobs=None) for t in group.trajectories)
    return replace(group, trajectories=trajectories)
