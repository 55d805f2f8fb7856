"""OBRS against the policy itself (target = policy): the learner makes the scores that the scorer could not.

For many optimizer steps per rollout batch the reference falls behind; p_t = p_new moves with every step. The scores
come from the same functions as the scorer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.algorithm.normalizer import Candidates, estimate_normalizer
from jackpot.algorithm.obrs import acceptance_mask, acceptance_probs, acceptance_uniforms
from jackpot.algorithm.vocabulary import VocabularyScores, token_logprobs
from jackpot.compute.forward import CompletionStates, completion_hidden
from jackpot.compute.models import output_head
from jackpot.compute.ranks.group import SOLO, Ranks
from jackpot.compute.ranks.partition import MicroRows
from jackpot.compute.ranks.sharding import release
from jackpot.config import JackpotCorrection
from jackpot.scoring.batch import Batch, TokenArrays
from jackpot.scoring.token_weights import TokenWeights, obrs_weights


@dataclass(frozen=True, slots=True)
class ScoringPass:
    """How hidden states come about, and who has the other sequences."""

    states: CompletionStates = completion_hidden
    ranks: Ranks = SOLO
    releases: bool = True  # gathered parameters, once the pass is over


def policy_target_weights(
    policy: PreTrainedModel,
    batch: Batch,
    passes: Sequence[MicroRows],
    correction: JackpotCorrection,
    obrs_lambda: float,
    job_seed: int,
    chunk_tokens: int,
    *,
    states: CompletionStates = completion_hidden,
    ranks: Ranks = SOLO,
) -> TokenWeights:
    """Weights of a step's trajectories with p_t = p_new as it stands before the step.

    Z's batch scalar needs every token before the first gradient, so this is a pass without gradients of its own.

    Args:
        policy: θ.
        batch: trajectories that still carry the actor's top-k.
        passes: this rank's sequences, those that go through the model together.
        correction: clips, mask, estimator and the target's own k.
        obrs_lambda: λ, the same for all: these scores are made anew, whatever λ the scorer had.
        job_seed: seeds the mask.
        chunk_tokens: slice of the vocabulary pass.
        states: how sequences become hidden states.
        ranks: who has the other sequences.
    """
    how = ScoringPass(states, ranks)
    scored = scored_tokens(policy, batch, passes, correction, obrs_lambda, job_seed, chunk_tokens, how)
    return obrs_weights(scored, correction, reference_logprobs=batch.tokens.reference_logprobs, ranks=ranks)


@torch.no_grad()
def scored_tokens(
    policy: PreTrainedModel,
    batch: Batch,
    passes: Sequence[MicroRows],
    correction: JackpotCorrection,
    obrs_lambda: float,
    job_seed: int,
    chunk_tokens: int,
    how: ScoringPass,
) -> TokenArrays:
    """The batch's tokens with the scores of p_t = p_new; arguments as :func:`policy_target_weights`."""
    tokens = batch.tokens
    # Each token is scored on one rank and 0 on the others, so that a sum over ranks puts the batch together.
    found = torch.zeros(4, batch.num_tokens)
    for one in passes:
        index = batch.token_index(one.rows)
        hidden = how.states(policy, *batch.inputs(one))
        scores, candidates = _score(policy, hidden, batch, tokens.select(index), correction.top_k, chunk_tokens)
        if one.counted:
            estimate = estimate_normalizer(correction.normalizer, candidates, obrs_lambda)
            found[:, index] = torch.stack([scores, estimate.head, estimate.tail, estimate.mass]).cpu()
    if how.releases:
        release(policy)
    how.ranks.sum_(found)
    target, head, tail, mass = found
    acceptance = acceptance_probs(target, tokens.actor_logprobs, obrs_lambda)
    uniforms = torch.cat([acceptance_uniforms(job_seed, s.trajectory_id, s.end - s.start) for s in batch.sequences])
    return replace(
        tokens,
        reference_logprobs=target,
        acceptance_probs=acceptance,
        mask=acceptance_mask(acceptance, uniforms).float(),
        normalizer_head=head,
        normalizer_tail=tail,
        topk_mass=mass,
        obrs_lambda=torch.full_like(target, obrs_lambda),
    )


def _score(
    policy: PreTrainedModel, hidden: Tensor, batch: Batch, tokens: TokenArrays, top_k: int, chunk_tokens: int
) -> tuple[Tensor, Candidates]:
    assert tokens.topk_ids is not None and tokens.topk_logprobs is not None
    device = hidden.device
    ids = torch.cat([tokens.token_ids[:, None], tokens.topk_ids], dim=1).to(device)
    scores: VocabularyScores = token_logprobs(
        hidden,
        output_head(policy),
        ids,
        temperature=batch.temperature,
        chunk_tokens=chunk_tokens,
        top_k=top_k,
    )
    assert scores.topk_ids is not None and scores.topk_logprobs is not None
    candidates = Candidates(
        actor_ids=tokens.topk_ids.to(device),
        actor_logprobs=tokens.topk_logprobs.to(device),
        target_logprobs_on_actor=scores.logprobs[:, 1:],
        target_ids=scores.topk_ids,
        target_logprobs=scores.topk_logprobs,
    )
    return scores.logprobs[:, 0], candidates
