"""Z and the divergences from whole rows of both models: for the full normalizer, and for replay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from jackpot.algorithm.diagnostics import exact_kl_before_and_after
from jackpot.algorithm.obrs import Candidates, estimate_normalizer, full_normalizer
from jackpot.algorithm.vocabulary import iterate_logprobs
from jackpot.compute.models import output_head
from jackpot.scoring.batch import TokenArrays
from jackpot.scoring.passes import ModelPasses, ScoringRule, rows_of


def read_whole_rows(
    figures_of_tokens: Tensor,
    tokens: TokenArrays,
    target: ModelPasses,
    rule: ScoringRule,
    lambdas: Sequence[float],
    actors: Iterable[ModelPasses],
) -> None:
    """Fill in all figures, [1 + 6 · lambdas, N], from whole rows of both models, one slice of tokens at a time."""
    assert rule.obrs is not None
    name = rule.obrs.normalizer
    passes = list(target.hidden())
    rank_places = torch.cat([torch.zeros(0, dtype=torch.int64), *(places for places, _ in passes)]).sort().values
    row_of = rows_of([rank_places], figures_of_tokens.shape[1])
    target_hidden = torch.empty(0)
    if passes:
        target_hidden = torch.empty_like(torch.cat([hidden for _, hidden in passes]))
        for places, hidden in passes:
            target_hidden[row_of[places].to(hidden.device)] = hidden
        figures_of_tokens[0, rank_places] = (
            target.at_ids(target_hidden, tokens.token_ids[rank_places], rule).logprobs.float().cpu()
        )
    for actor in actors:
        for places, actor_hidden in actor.hidden():
            hidden = target_hidden[row_of[places].to(actor_hidden.device)]
            for part, p_target, p_actor in _rows_of_both(target, hidden, actor, actor_hidden, rule):
                candidates = None if name == "full" else _candidates_of_rows(p_target, p_actor, rule, rule.obrs.top_k)
                figures: list[Tensor] = []
                for each in lambdas:
                    full = full_normalizer(p_target, p_actor, each)
                    parts = full if candidates is None else estimate_normalizer(name, candidates, each)
                    exact_kl = exact_kl_before_and_after(p_target, p_actor, each)
                    figures += [parts.head, parts.tail, parts.mass, full.head, *exact_kl]
                figures_of_tokens[1:, places[part]] = torch.stack([figure.float() for figure in figures]).cpu()


def _rows_of_both(
    target: ModelPasses, target_hidden: Tensor, actor: ModelPasses, actor_hidden: Tensor, rule: ScoringRule
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Log-probabilities of both models, [c, V] each, for one slice of the tokens at a time."""
    by_slices = partial(iterate_logprobs, temperature=rule.temperature, chunk_tokens=rule.chunk_tokens)
    target_rows = by_slices(target_hidden, output_head(target.model))
    actor_rows = by_slices(actor_hidden, output_head(actor.model))
    for (part, p_target), (_, p_actor) in zip(target_rows, actor_rows, strict=True):
        yield part, p_target, p_actor


def _candidates_of_rows(p_target: Tensor, p_actor: Tensor, rule: ScoringRule, target_top_k: int) -> Candidates:
    """What an estimator sees: the actor's top-k in the precision in which it is sent, and the target's top-k."""
    vocabulary = p_target.shape[-1]
    actor = p_actor.topk(min(rule.actor_top_k, vocabulary), dim=-1)
    target = p_target.topk(min(target_top_k, vocabulary), dim=-1)
    return Candidates(
        actor_ids=actor.indices,
        actor_logprobs=actor.values.half().float(),
        target_logprobs_on_actor=p_target.gather(1, actor.indices),
        target_ids=target.indices,
        target_logprobs=target.values,
        actor_logprobs_on_target=p_actor.gather(1, target.indices),
    )
