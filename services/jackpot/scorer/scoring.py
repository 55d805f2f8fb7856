"""From groups to scored groups: what the target policy says about each token, and what OBRS makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.algorithm.diagnostics import exact_kl_before_and_after
from jackpot.algorithm.normalizer import Candidates, NormalizerParts, estimate_normalizer, full_normalizer
from jackpot.algorithm.obrs import acceptance_mask, acceptance_probs, acceptance_uniforms
from jackpot.algorithm.vocabulary import iterate_logprobs, token_logprobs
from jackpot.config import JackpotCorrection, JobSpec
from jackpot.errors import ScoringError
from jackpot.runtime.models import output_head
from jackpot.scorer.passes import LookedUp, PassSettings, flat_hidden, hidden_by_pass, look_up
from jackpot.scorer.tokens import FlatTokens, check_group, flatten
from jackpot.trajectory import EXACT_KL, Group, ScoredGroup, TokenScores, Trajectory

NO_NORMALIZER = "none"
"""Stamped on groups of corrections that know no Z."""


def needs_actor(job: JobSpec) -> bool:
    """Whether the job's normalizer runs the actor's own forward pass in the scorer."""
    correction = job.algorithm.correction
    return isinstance(correction, JackpotCorrection) and correction.normalizer != "tail"


class Target(Protocol):
    """The target policy as it is now: :class:`jackpot.scorer.target.TargetPolicy` in the service."""

    @property
    def model(self) -> PreTrainedModel:
        """θ."""

    @property
    def version(self) -> int | None:
        """Its version; None before the first."""

    @property
    def obrs_lambda(self) -> float:
        """λ that goes with it."""

    @property
    def vocabulary(self) -> int:
        """V, the number of token ids."""


class Actors(Protocol):
    """The actor at past versions: :class:`jackpot.scorer.target.ActorVersions` in the service."""

    def at(self, version: int) -> PreTrainedModel:
        """The actor with the weights of ``version``, until the next call.

        Raises:
            WeightMissingError: that version is gone.
        """


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """What was found of one trajectory."""

    scores: TokenScores
    exact_kl: list[float] | None  # KL before and after OBRS, summed over its tokens; with normalizer full alone


class GroupScorer:
    """Scores groups with the target policy as it is now.

    Args:
        job: the job as resolved.
        target: the target policy.
        actors: the actor at the versions that sampled; required where :func:`needs_actor`.
    """

    def __init__(self, job: JobSpec, target: Target, actors: Actors | None = None) -> None:
        correction = job.algorithm.correction
        self._obrs = correction if isinstance(correction, JackpotCorrection) else None
        self._with_topk = self._obrs is not None and self._obrs.normalizer != "full"
        # Where the learner makes the scores that count.
        self._keeps_topk = self._obrs is not None and (self._obrs.target == "policy" or job.scorer.reuse_reference)
        self._job = job
        self._target = target
        self._actors = actors

    @torch.inference_mode()
    def score_groups(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """Score groups, all with one version of the policy. A group's scores do not depend on its company.

        Raises:
            PayloadError: a group's arrays do not fit the model or the job.
            ScoringError: a score is not finite, or no policy version is loaded yet.
            WeightMissingError: an actor version that sampled is gone.
            WeightCorruptError: an actor version that sampled is damaged.
        """
        version, obrs_lambda = self._target.version, self._target.obrs_lambda
        if version is None:
            raise ScoringError("no version of the policy's weights is loaded yet. Wait until the scorer is ready.")
        alike: dict[tuple[float, int], list[tuple[Group, Trajectory]]] = {}
        for group in groups:
            check_group(group, self._target.vocabulary, with_topk=self._with_topk)
            for trajectory in group.trajectories:
                k = trajectory.topk_ids.shape[1] if self._with_topk and trajectory.topk_ids is not None else 0
                alike.setdefault((group.temperature, k), []).append((group, trajectory))
        scores: dict[int, _Found] = {}
        for (temperature, _), members in alike.items():
            found = self._score(members, temperature, obrs_lambda)
            scores.update((id(trajectory), one) for (_, trajectory), one in zip(members, found, strict=True))
        return [
            ScoredGroup(
                group=self._scored_group(group, [scores[id(trajectory)] for trajectory in group.trajectories]),
                scores=tuple(scores[id(trajectory)].scores for trajectory in group.trajectories),
                obrs_lambda=obrs_lambda,
                policy_version=version,
                normalizer=self._obrs.normalizer if self._obrs else NO_NORMALIZER,
            )
            for group in groups
        ]

    def _scored_group(self, group: Group, found: Sequence[_Found]) -> Group:
        """The group as the learner gets it: without what nobody asks for any more, with its exact divergences."""
        group = group if self._keeps_topk else _without_topk(group)
        sums = [one.exact_kl for one in found if one.exact_kl is not None]
        if not sums:
            return group
        return replace(
            group, metadata={**group.metadata, EXACT_KL: [sum(values) for values in zip(*sums, strict=True)]}
        )

    def _score(
        self, members: Sequence[tuple[Group, Trajectory]], temperature: float, obrs_lambda: float
    ) -> list[_Found]:
        settings = PassSettings(self._job.scorer.max_batch_tokens, self._job.scorer.chunk_tokens, temperature)
        tokens = flatten(members, self._target.model.device, with_topk=self._with_topk)
        if self._obrs is None:
            looked_up = look_up(self._target.model, tokens.runs, tokens.token_ids[:, None], settings)
            target_logprobs = looked_up.logprobs[:, 0]
            acceptance = torch.ones_like(target_logprobs)
            no_tail = torch.zeros_like(acceptance)
            parts = NormalizerParts(head=acceptance, tail=no_tail, mass=target_logprobs.exp())
            return self._cut(tokens, target_logprobs, acceptance, parts)
        exact_kl: Tensor | None = None
        if self._obrs.normalizer == "full":
            target_logprobs, parts, exact_kl = self._full(tokens, settings, obrs_lambda)
        else:
            ids = torch.cat([tokens.token_ids[:, None], tokens.topk_ids], dim=1)
            target = look_up(self._target.model, tokens.runs, ids, settings, top_k=self._obrs.top_k)
            target_logprobs = target.logprobs[:, 0]
            candidates = self._candidates(tokens, target, settings)
            parts = estimate_normalizer(self._obrs.normalizer, candidates, obrs_lambda)
        acceptance = acceptance_probs(target_logprobs, tokens.actor_logprobs, obrs_lambda)
        return self._cut(tokens, target_logprobs, acceptance, parts, exact_kl)

    def _candidates(self, tokens: FlatTokens, target: LookedUp, settings: PassSettings) -> Candidates:
        """The actor's returned top-k and the target's own; with the actor's forward, p_inf is exact on both."""
        actor_logprobs, actor_logprobs_on_target = tokens.topk_logprobs, None
        if self._actors is not None:
            union = torch.cat([tokens.topk_ids, target.top_ids], dim=1)
            exact = torch.zeros(union.shape, device=union.device)
            for version, runs in tokens.runs_by_version().items():
                # Runs do not overlap, and what lies outside of them is zero.
                exact += look_up(self._actors.at(version), runs, union, settings).logprobs
            actor_logprobs, actor_logprobs_on_target = exact.tensor_split([tokens.topk_ids.shape[1]], dim=1)
        return Candidates(
            actor_ids=tokens.topk_ids,
            actor_logprobs=actor_logprobs,
            target_logprobs_on_actor=target.logprobs[:, 1:],
            target_ids=target.top_ids,
            target_logprobs=target.top_logprobs,
            actor_logprobs_on_target=actor_logprobs_on_target,
        )

    def _full(
        self, tokens: FlatTokens, settings: PassSettings, obrs_lambda: float
    ) -> tuple[Tensor, NormalizerParts, Tensor]:
        """log p_t of the sampled tokens, and over the whole vocabulary Z and the KLs [N, 2]; by slices of tokens."""
        assert self._actors is not None
        policy = self._target.model
        head, chunk = output_head(policy), settings.chunk_tokens
        hidden = flat_hidden(policy, tokens.runs, len(tokens), settings)
        sampled = token_logprobs(
            hidden, head, tokens.token_ids, temperature=settings.temperature, chunk_tokens=chunk
        ).logprobs
        z = torch.zeros_like(sampled)
        exact_kl = z.new_zeros(len(z), 2)
        for version, runs in tokens.runs_by_version().items():
            actor = self._actors.at(version)
            for where, actor_hidden in hidden_by_pass(actor, runs, settings):
                policy_rows = iterate_logprobs(
                    hidden[where], head, temperature=settings.temperature, chunk_tokens=chunk
                )
                actor_rows = iterate_logprobs(
                    actor_hidden, output_head(actor), temperature=settings.temperature, chunk_tokens=chunk
                )
                for (part, p_target), (_, p_actor) in zip(policy_rows, actor_rows, strict=True):
                    z[where[part]] = full_normalizer(p_target, p_actor, obrs_lambda).head
                    exact_kl[where[part]] = torch.stack(exact_kl_before_and_after(p_target, p_actor, obrs_lambda), 1)
        return sampled, NormalizerParts(head=z, tail=torch.zeros_like(z), mass=torch.ones_like(z)), exact_kl

    def _cut(
        self,
        tokens: FlatTokens,
        target_logprobs: Tensor,
        acceptance: Tensor,
        parts: NormalizerParts,
        exact_kl: Tensor | None = None,
    ) -> list[_Found]:
        """The scores of each trajectory, with its mask."""
        arrays = [t.float().cpu().numpy() for t in (target_logprobs, acceptance, parts.head, parts.tail, parts.mass)]
        scores = []
        for run in tokens.runs:
            logprobs, accepted, head, tail, mass = (array[run.offset : run.offset + run.end] for array in arrays)
            if not all(np.isfinite(array).all() for array in (logprobs, accepted, head, tail, mass)):
                raise ScoringError(
                    f"trajectory {run.trajectory.trajectory_id}: its scores under policy version "
                    f"{self._target.version} are not finite. Look for a diverged loss in the learner's log."
                )
            uniforms = acceptance_uniforms(self._job.seed, run.trajectory.trajectory_id, run.end)
            one = TokenScores(
                target_logprobs=logprobs,
                acceptance_probs=accepted,
                mask=acceptance_mask(torch.from_numpy(accepted), uniforms).numpy(),
                normalizer_head=head,
                normalizer_tail=tail,
                topk_mass=mass,
            )
            own = None if exact_kl is None else exact_kl[run.offset : run.offset + run.end].double().sum(0).tolist()
            scores.append(_Found(one, own))
        return scores


def _without_topk(group: Group) -> Group:
    """Top-k is most of a group's bytes, and after scoring nobody asks for it."""
    trajectories = tuple(replace(t, topk_ids=None, topk_logprobs=None) for t in group.trajectories)
    return replace(group, trajectories=trajectories)
