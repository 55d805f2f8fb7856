"""From groups to scored groups: what the target policy says about each token, and what OBRS makes of it."""

from __future__ import annotations

import logging
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
from jackpot.compute import varlen
from jackpot.compute.model_inputs import check_group
from jackpot.compute.models import output_head
from jackpot.compute.packing_trial import agreed_problem_with_varlen
from jackpot.compute.ranks.group import SOLO, Ranks
from jackpot.compute.ranks.sharding import release
from jackpot.compute.shared_prompts import attention_cost
from jackpot.config import JackpotCorrection, JobSpec
from jackpot.errors import ScoringError
from jackpot.scoring.passes import LookedUp, PassSettings, flat_hidden, hidden_by_pass, look_up
from jackpot.scoring.rank_share import Share, rank_share
from jackpot.scoring.tokens import FlatTokens, Run, by_version, flatten, lay_out
from jackpot.trajectory import EXACT_KL, Group, ScoredGroup, TokenScores, Trajectory

LOG = logging.getLogger(__name__)

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
        ranks: the processes that score together, over which the models are sharded. Each passes its share of the
            trajectories; all of them are to be asked for the same groups at once, and all get all scores.
        has_varlen: whether torch has the kernel of attention by lengths; the target's model is switched to it then,
            unless the job packs never.
    """

    def __init__(
        self,
        job: JobSpec,
        target: Target,
        actors: Actors | None = None,
        ranks: Ranks = SOLO,
        has_varlen: varlen.HasKernel = varlen.is_available,
    ) -> None:
        correction = job.algorithm.correction
        self._obrs = correction if isinstance(correction, JackpotCorrection) else None
        self._with_topk = self._obrs is not None and self._obrs.normalizer != "full"
        # Where the learner makes the scores that count.
        self._keeps_topk = self._obrs is not None and (self._obrs.target == "policy" or job.scorer.reuse_reference)
        self._job = job
        self._target = target
        self._actors = actors
        self._ranks = ranks
        self._pass_settings = _pass_settings(job, target.model, ranks.device or target.model.device, ranks, has_varlen)
        release(target.model)

    def check(self, groups: Sequence[Group]) -> None:
        """Refuse what cannot be scored before anything is computed. Errors as :meth:`score_groups`."""
        if self._target.version is None:
            raise ScoringError("no version of the policy's weights is loaded yet. Wait until the scorer is ready.")
        for group in groups:
            check_group(group, self._target.vocabulary, with_topk=self._with_topk)

    @torch.no_grad()  # not inference_mode: FSDP's bookkeeping does not know it
    def score_groups(self, groups: Sequence[Group]) -> list[ScoredGroup]:
        """Score groups, all with one version of the policy. A group's scores do not depend on its company.

        Raises:
            PayloadError: a group's arrays do not fit the model or the job.
            ScoringError: a score is not finite, or no policy version is loaded yet.
            WeightMissingError: an actor version that sampled is gone.
            WeightCorruptError: an actor version that sampled is damaged.
        """
        self.check(groups)
        version, obrs_lambda = self._target.version, self._target.obrs_lambda
        assert version is not None
        alike: dict[tuple[float, int], list[tuple[Group, Trajectory]]] = {}
        for group in groups:
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
        settings = replace(self._pass_settings, temperature=temperature)
        share = rank_share(members, settings, self._ranks)
        runs = lay_out(members)
        # Each token is scored on one rank and 0 on the others, so that a sum over ranks puts the call together.
        found = torch.zeros(_NUM_FIGURES, sum(run.end for run in runs))
        if share.members:
            found[:, share.places] = self._score_share(share, settings, obrs_lambda)
        else:
            self._fill(share, settings)
        release(self._target.model)
        self._ranks.sum_(found)
        return self._cut(runs, found)

    def _score_share(self, share: Share, settings: PassSettings, obrs_lambda: float) -> Tensor:
        """What is found of this rank's tokens, [_NUM_FIGURES, n] on the CPU: log p_t, acceptance, the three of
        NormalizerParts, and with the full normalizer KL before and after OBRS."""
        tokens = flatten(share.members, self._target.model.device, with_topk=self._with_topk)
        if self._obrs is None:
            ids = tokens.token_ids[:, None]
            looked_up = look_up(self._target.model, tokens.runs, ids, settings, least_passes=share.policy_passes)
            target_logprobs = looked_up.logprobs[:, 0]
            acceptance = torch.ones_like(target_logprobs)
            no_tail = torch.zeros_like(acceptance)
            parts = NormalizerParts(head=acceptance, tail=no_tail, mass=target_logprobs.exp())
            return _figures(target_logprobs, acceptance, parts)
        exact_kl: Tensor | None = None
        if self._obrs.normalizer == "full":
            target_logprobs, parts, exact_kl = self._full(tokens, share, settings, obrs_lambda)
        else:
            ids = torch.cat([tokens.token_ids[:, None], tokens.topk_ids], dim=1)
            top_k = self._obrs.top_k
            target = look_up(
                self._target.model, tokens.runs, ids, settings, top_k=top_k, least_passes=share.policy_passes
            )
            target_logprobs = target.logprobs[:, 0]
            candidates = self._candidates(tokens, target, share, settings)
            parts = estimate_normalizer(self._obrs.normalizer, candidates, obrs_lambda)
        acceptance = acceptance_probs(target_logprobs, tokens.actor_logprobs, obrs_lambda)
        return _figures(target_logprobs, acceptance, parts, exact_kl)

    def _fill(self, share: Share, settings: PassSettings) -> None:
        """Be there for the passes of the other ranks, without any tokens of one's own."""
        list(hidden_by_pass(self._target.model, [], settings, share.policy_passes))
        if self._actors is not None:
            for version, passes in share.actor_passes.items():
                list(hidden_by_pass(self._actors.at(version), [], settings.apart(), passes))

    def _candidates(self, tokens: FlatTokens, target: LookedUp, share: Share, settings: PassSettings) -> Candidates:
        """The actor's returned top-k and the target's own; with the actor's forward, p_inf is exact on both."""
        actor_logprobs, actor_logprobs_on_target = tokens.topk_logprobs, None
        if self._actors is not None:
            union = torch.cat([tokens.topk_ids, target.top_ids], dim=1)
            exact = torch.zeros(union.shape, device=union.device)
            runs = by_version(tokens.runs)
            for version, passes in share.actor_passes.items():
                actor = self._actors.at(version)
                # Runs do not overlap, and what lies outside of them is zero.
                exact += look_up(actor, runs.get(version, []), union, settings.apart(), least_passes=passes).logprobs
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
        self, tokens: FlatTokens, share: Share, settings: PassSettings, obrs_lambda: float
    ) -> tuple[Tensor, NormalizerParts, Tensor]:
        """log p_t of the sampled tokens, and over the whole vocabulary Z and the KLs [N, 2]; by slices of tokens."""
        assert self._actors is not None
        policy = self._target.model
        hidden = flat_hidden(policy, tokens.runs, len(tokens), settings, share.policy_passes)
        head, chunk = output_head(policy), settings.chunk_tokens
        sampled = token_logprobs(
            hidden, head, tokens.token_ids, temperature=settings.temperature, chunk_tokens=chunk
        ).logprobs
        z = torch.zeros_like(sampled)
        exact_kl = z.new_zeros(len(z), 2)
        runs = by_version(tokens.runs)
        for version, passes in share.actor_passes.items():
            actor = self._actors.at(version)
            for where, actor_hidden in hidden_by_pass(actor, runs.get(version, []), settings.apart(), passes):
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

    def _cut(self, runs: Sequence[Run], found: Tensor) -> list[_Found]:
        """The scores of each trajectory, with its mask. ``found`` is [_NUM_FIGURES, N]."""
        arrays = found.numpy()
        scores = []
        for run in runs:
            own = arrays[:, run.offset : run.offset + run.end].copy()
            logprobs, accepted, head, tail, mass, *exact_kl = own
            if not np.isfinite(own[:5]).all():
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
            full = self._obrs is not None and self._obrs.normalizer == "full"
            scores.append(_Found(one, [float(kl.sum(dtype=np.float64)) for kl in exact_kl] if full else None))
        return scores


def _pass_settings(
    job: JobSpec, model: PreTrainedModel, device: torch.device, ranks: Ranks, has_varlen: varlen.HasKernel
) -> PassSettings:
    """How the target's passes are laid out, for any temperature; a collective of a sharded model."""
    scorer = job.scorer
    rows = PassSettings(scorer.max_batch_tokens, scorer.chunk_tokens, temperature=1.0)
    if scorer.packing == "never":
        return rows
    rows = replace(rows, attention=attention_cost([model], device, ranks))
    problem = agreed_problem_with_varlen([(model, model.dtype)], device, ranks, has_varlen)
    if problem is not None:
        LOG.info("sequences are not packed: %s", problem)
        return rows
    varlen.switch(model)
    LOG.info("sequences are packed", extra={"attention": "by lengths"})
    return replace(rows, packed=True)


_NUM_FIGURES = 7  # of a token


def _figures(
    target_logprobs: Tensor, acceptance: Tensor, parts: NormalizerParts, exact_kl: Tensor | None = None
) -> Tensor:
    if exact_kl is None:
        exact_kl = target_logprobs.new_zeros(len(target_logprobs), 2)
    rows = [target_logprobs, acceptance, parts.head, parts.tail, parts.mass, *exact_kl.unbind(1)]
    return torch.stack([row.float() for row in rows]).cpu()


def _without_topk(group: Group) -> Group:
    """Top-k is most of a group's bytes, and after scoring nobody asks for it."""
    trajectories = tuple(replace(t, topk_ids=None, topk_logprobs=None) for t in group.trajectories)
    return replace(group, trajectories=trajectories)
