"""OBRS scores of tokens: log p_t, the acceptance and its mask, the ingredients of Z (paper §3, §4.4).

Scorer, learner and replay all score here. :func:`read_models` runs the models, pass by pass, for any normalizer.
:func:`accept_tokens` then accepts tokens. :func:`score_tokens` does both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jackpot.algorithm.obrs import (
    Candidates,
    NormalizerParts,
    acceptance_mask,
    acceptance_probs,
    acceptance_uniforms,
    estimate_normalizer,
)
from jackpot.compute.ranks.group import SOLO, Ranks
from jackpot.scoring.batch import SequenceSlice, TokenArrays
from jackpot.scoring.passes import ModelPasses, ScoringRule, rows_of
from jackpot.scoring.whole_rows import read_whole_rows


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ExactFigures:
    """Exact figures from whole rows of both models at N positions; [N] float32."""

    normalizer: Tensor  # Z
    kl_before: Tensor  # KL(p_t ‖ p_inf)
    kl_after: Tensor  # KL(p_t ‖ p'_inf)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LambdaReadings:
    """The figures for one λ."""

    parts: NormalizerParts
    exact: ExactFigures | None  # None unless whole rows were read


@dataclass(frozen=True, slots=True, eq=False)
class Readings:
    """What the models give for N tokens."""

    lambdas: tuple[float, ...]  # none without OBRS
    figures: Tensor
    """[1 + F · lambdas, N] float32: log p_t of the sampled tokens, then head, tail and mass for each λ. Whole rows also
    give Z and KL before and after OBRS."""

    @property
    def target_logprobs(self) -> Tensor:
        """log p_t of the sampled tokens, [N]."""
        return self.figures[0]

    def at(self, obrs_lambda: float) -> LambdaReadings:
        """The figures for one of the λ."""
        of_lambda = self.figures[1:].chunk(len(self.lambdas))[self.lambdas.index(obrs_lambda)]
        head, tail, mass, *exact = of_lambda
        return LambdaReadings(
            parts=NormalizerParts(head=head, tail=tail, mass=mass),
            exact=ExactFigures(normalizer=exact[0], kl_before=exact[1], kl_after=exact[2]) if exact else None,
        )

    @classmethod
    def join(cls, parts: Sequence[Readings]) -> Readings:
        """The readings of consecutive runs of tokens, all read for the same λ."""
        return cls(parts[0].lambdas, torch.cat([part.figures for part in parts], dim=1))


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """N tokens with their scores. ``tokens.reference_logprobs`` are the target's."""

    tokens: TokenArrays
    exact: ExactFigures | None


def score_tokens(
    tokens: TokenArrays,
    target: ModelPasses,
    rule: ScoringRule,
    obrs_lambda: float,
    actors: Iterable[ModelPasses] | None = None,
    ranks: Ranks = SOLO,
) -> Scores:
    """Score tokens with the target policy; a collective.

    Args:
        tokens: the sampled tokens, with the actor's top-k unless whole rows are read.
        target: θ, and this rank's passes of whole sequences. They need not cover all N tokens.
        rule: what to compute.
        obrs_lambda: λ.
        actors: the actor at each version that sampled, with this rank's passes of its parts; None if the actor is
            not run. The next one is requested once the previous one's passes are done.
        ranks: the processes that run the other sequences; all receive all scores.
    """
    readings = read_models(tokens, target, rule, [obrs_lambda], actors, ranks)
    tokens = replace(tokens, reference_logprobs=readings.target_logprobs)
    if rule.obrs is None:
        ones = torch.ones_like(readings.target_logprobs)
        parts = NormalizerParts(head=ones, tail=torch.zeros_like(ones), mass=readings.target_logprobs.exp())
        accepted = replace(tokens, acceptance_probs=ones, mask=ones, obrs_lambda=torch.zeros_like(ones))
        return Scores(with_parts(accepted, parts), None)
    reading = readings.at(obrs_lambda)
    accepted = accept_tokens(tokens, target.sequences, obrs_lambda, rule.job_seed)
    return Scores(with_parts(accepted, reading.parts), reading.exact)


def accept_tokens(
    tokens: TokenArrays, sequences: Sequence[SequenceSlice], obrs_lambda: float, job_seed: int
) -> TokenArrays:
    """The tokens with their acceptance probabilities and mask at λ. A trajectory's mask is the same on any worker.

    Args:
        tokens: N tokens; ``reference_logprobs`` holds the target's log-probabilities.
        sequences: whole trajectories, in the order of the tokens.
        obrs_lambda: λ.
        job_seed: seeds the mask.
    """
    acceptance = acceptance_probs(tokens.reference_logprobs, tokens.actor_logprobs, obrs_lambda)
    uniforms = torch.cat([acceptance_uniforms(job_seed, s.trajectory_id, s.end - s.start) for s in sequences])
    mask = acceptance_mask(acceptance, uniforms).float()
    return replace(tokens, acceptance_probs=acceptance, mask=mask, obrs_lambda=torch.full_like(acceptance, obrs_lambda))


def with_parts(tokens: TokenArrays, parts: NormalizerParts) -> TokenArrays:
    """The tokens with the ingredients of Z."""
    return replace(tokens, normalizer_head=parts.head, normalizer_tail=parts.tail, topk_mass=parts.mass)


@torch.no_grad()  # not inference_mode, which FSDP does not support
def read_models(
    tokens: TokenArrays,
    target: ModelPasses,
    rule: ScoringRule,
    lambdas: Sequence[float],
    actors: Iterable[ModelPasses] | None = None,
    ranks: Ranks = SOLO,
) -> Readings:
    """Run the target, and the actors where given, over every token, for several λ at once.

    Arguments as :func:`score_tokens`.
    """
    lambdas = lambdas if rule.obrs is not None else []
    num_figures = 6 if rule.whole_rows else 3
    # One rank reads each token and the others leave it 0, so that the sum over ranks holds all of them.
    figures_of_tokens = torch.zeros(1 + num_figures * len(lambdas), len(tokens.token_ids))
    if rule.obrs is None:
        for places, hidden in target.hidden():
            figures_of_tokens[0, places] = target.at_ids(hidden, tokens.token_ids[places], rule).logprobs.float().cpu()
    elif rule.whole_rows:
        assert actors is not None, "whole rows of the actor need its forward pass"
        read_whole_rows(figures_of_tokens, tokens, target, rule, lambdas, actors)
    else:
        seen = _candidates(tokens, target, rule, rule.obrs.top_k)
        if actors is not None:
            seen = _with_exact_actor(seen, actors, rule, len(tokens.token_ids))
        for places, logprobs, candidates in seen:
            parts = [estimate_normalizer(rule.obrs.normalizer, candidates, each) for each in lambdas]
            figures = [logprobs, *(figure for each in parts for figure in (each.head, each.tail, each.mass))]
            figures_of_tokens[:, places] = torch.stack([figure.float() for figure in figures]).cpu()
    ranks.sum_(figures_of_tokens)
    return Readings(tuple(lambdas), figures_of_tokens)


_Seen = tuple[Tensor, Tensor, Candidates]  # positions [n] among the N, log p_t [n], candidates at n positions


def _candidates(tokens: TokenArrays, target: ModelPasses, rule: ScoringRule, top_k: int) -> Iterator[_Seen]:
    """The actor's returned top-k and the target's top-k, one pass at a time."""
    assert tokens.topk_ids is not None and tokens.topk_logprobs is not None
    for places, hidden in target.hidden():
        actor_ids = tokens.topk_ids[places].to(hidden.device)
        ids = torch.cat([tokens.token_ids[places].to(hidden.device)[:, None], actor_ids], dim=1)
        scores = target.at_ids(hidden, ids, rule, top_k)
        assert scores.topk_ids is not None and scores.topk_logprobs is not None
        candidates = Candidates(
            actor_ids=actor_ids,
            actor_logprobs=tokens.topk_logprobs[places].to(hidden.device),
            target_logprobs_on_actor=scores.logprobs[:, 1:],
            target_ids=scores.topk_ids,
            target_logprobs=scores.topk_logprobs,
        )
        yield places, scores.logprobs[:, 0], candidates


def _with_exact_actor(
    seen: Iterable[_Seen], actors: Iterable[ModelPasses], rule: ScoringRule, num_tokens: int
) -> Iterator[_Seen]:
    """The same with exact p_inf on all candidates, from the actors' forward passes."""
    passes = list(seen)
    row_of = rows_of([places for places, *_ in passes], num_tokens)
    unions = [torch.cat([candidates.actor_ids, candidates.target_ids], dim=1) for *_, candidates in passes]
    union = torch.cat(unions) if unions else torch.zeros(0, 0, dtype=torch.int64)
    exact = torch.zeros(union.shape, device=union.device)
    for actor in actors:
        for places, hidden in actor.hidden():
            rows = row_of[places].to(union.device)
            exact[rows] = actor.at_ids(hidden, union[rows], rule).logprobs
    each_exact = torch.split(exact, [len(places) for places, *_ in passes])
    for (places, logprobs, candidates), exact_logprobs in zip(passes, each_exact, strict=True):
        on_actor, on_target = exact_logprobs.tensor_split([candidates.actor_ids.shape[1]], dim=1)
        yield places, logprobs, replace(candidates, actor_logprobs=on_actor, actor_logprobs_on_target=on_target)
