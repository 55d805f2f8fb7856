"""The learner's scores of a step's trajectories, from the policy just before the step: p_t = p_new.

With target = policy the learner scores because the scorer's policy has fallen behind: p_t moves with every step, and
p_ref stays what it was when the batch arrived. With ``scorer.reuse_reference`` the learner scores because no scorer
runs: with one update per batch the reference is the present policy.
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
    """Whether the learner computes the scores that count."""
    obrs = job.algorithm.correction.obrs
    return job.scorer.reuse_reference or (obrs is not None and obrs.target == "policy")


@dataclass(frozen=True, slots=True, eq=False)
class StepScores:
    """A step's trajectories and their weights."""

    batch: Batch  # its reference is the policy itself if no scorer provided one
    weights: TokenWeights
    hidden: Tensor | None  # of the only pass, with its graph, for the losses; None if there are several passes


def score_step(job: JobSpec, batch: Batch, policy: ModelPasses, obrs_lambda: float, ranks: Ranks = SOLO) -> StepScores:
    """Score a step's trajectories and weigh their tokens; a collective.

    Z's batch scalar needs every token before the first gradient. A batch that fits into one pass therefore uses that
    pass's hidden states for both scores and losses; a larger batch first takes passes without gradients.

    Args:
        job: the job as resolved.
        batch: trajectories that still carry the actor's top-k if the correction is OBRS.
        policy: θ, and this rank's passes of the batch.
        obrs_lambda: λ, the same for all tokens, independent of any scorer's λ.
        ranks: the processes that run the other sequences.
    """
    only = policy.states_of(policy.passes[0]) if len(policy.passes) == 1 else None
    passes = policy if only is None else policy.lend(only.detach())
    tokens = score_tokens(batch.tokens, passes, ScoringRule.of_job(job, batch.temperature), obrs_lambda, ranks=ranks)
    if only is None:  # else the pass's graph and the losses still need the gathered parameters
        release(policy.model)
    correction = job.algorithm.correction
    if job.scorer.reuse_reference:
        weights = token_weights(tokens.tokens, correction, ranks=ranks)
        return StepScores(replace(batch, tokens=tokens.tokens), weights, only)
    weights = token_weights(tokens.tokens, correction, batch.tokens.reference_logprobs, ranks)
    return StepScores(batch, weights, only)
