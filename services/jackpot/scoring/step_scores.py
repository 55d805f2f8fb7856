"""Scores that the learner makes of a step's trajectories, with the policy as it stands before the step: p_t = p_new.

With target = policy, because the scorer's policy has fallen behind: p_t moves with every step, p_ref stays what the
batch came with. With ``scorer.reuse_reference``, because no scorer runs: one update per batch makes the reference the
policy as it is now.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from jackpot.compute.ranks.group import SOLO, Ranks
from jackpot.compute.ranks.sharding import release
from jackpot.config import JobSpec
from jackpot.scoring.batch import Batch
from jackpot.scoring.passes import ModelPasses, ScoringRule
from jackpot.scoring.score import score_tokens
from jackpot.scoring.token_weights import TokenWeights, token_weights


def learner_scores(job: JobSpec) -> bool:
    """Whether the scores that count are made here."""
    obrs = job.algorithm.correction.obrs
    return job.scorer.reuse_reference or (obrs is not None and obrs.target == "policy")


@dataclass(frozen=True, slots=True, eq=False)
class StepScores:
    """A step's trajectories and their weights."""

    batch: Batch  # whose reference is the policy itself, where no scorer gave it one
    weights: TokenWeights
    hidden: Tensor | None  # of the only pass, with its graph, for the losses; None where there are several


def score_step(job: JobSpec, batch: Batch, policy: ModelPasses, obrs_lambda: float, ranks: Ranks = SOLO) -> StepScores:
    """Score a step's trajectories and weigh their tokens; a collective.

    Z's batch scalar needs every token before the first gradient: a batch that goes through the model in one pass lends
    that pass's hidden states to scores and losses; a larger one takes passes without gradients first.

    Args:
        job: the job as resolved.
        batch: trajectories that still carry the actor's top-k, where the correction is OBRS.
        policy: θ, and this rank's passes of the batch.
        obrs_lambda: λ, the same for all: these scores are made now, whatever λ a scorer had.
        ranks: who passes the other sequences.
    """
    only = policy.states_of(policy.passes[0]) if len(policy.passes) == 1 else None
    passes = policy if only is None else policy.lend(only.detach())
    tokens = score_tokens(batch.tokens, passes, ScoringRule.of_job(job, batch.temperature), obrs_lambda, ranks=ranks)
    if only is None:  # else the graph of the pass and the losses still need gathered parameters
        release(policy.model)
    correction = job.algorithm.correction
    if job.scorer.reuse_reference:
        weights = token_weights(tokens.tokens, correction, ranks=ranks)
        return StepScores(replace(batch, tokens=tokens.tokens), weights, only)
    weights = token_weights(tokens.tokens, correction, batch.tokens.reference_logprobs, ranks)
    return StepScores(batch, weights, only)
