"""p_ref from the learner's own forward pass, where one update per batch makes the reference the policy as it is now.

No scorer runs then (``scorer.reuse_reference``). The scores come from the same functions as a scorer's. Z's batch
scalar needs every token before the first gradient: a batch that goes through the model in one pass lends that
pass's hidden states to the scores; a larger one takes a pass without gradients first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.algorithm.vocabulary import token_logprobs
from jackpot.compute.models import output_head
from jackpot.compute.ranks.partition import MicroRows
from jackpot.compute.ranks.sharding import release
from jackpot.config import CorrectionConfig, JackpotCorrection
from jackpot.scoring.batch import Batch
from jackpot.scoring.policy_target import ScoringPass, scored_tokens
from jackpot.scoring.token_weights import TokenWeights, obrs_weights, reference_target_weights


@dataclass(frozen=True, slots=True, eq=False)
class OwnReference:
    """A batch whose reference is the policy itself, and its weights."""

    batch: Batch
    weights: TokenWeights
    hidden: Tensor | None  # of the only pass, with its graph; None where there are several


def own_reference(
    policy: PreTrainedModel,
    batch: Batch,
    passes: Sequence[MicroRows],
    correction: CorrectionConfig,
    obrs_lambda: float,
    job_seed: int,
    chunk_tokens: int,
    how: ScoringPass,
) -> OwnReference:
    """Score a batch with the policy as it stands before the step. Arguments as :func:`scored_tokens`."""
    only = how.states(policy, *batch.inputs(passes[0])) if len(passes) == 1 else None
    if only is not None:
        detached = only.detach()
        # Gathered parameters stay: the graph of the pass and the losses still need them.
        how = replace(how, states=lambda *_: detached, releases=False)
    if isinstance(correction, JackpotCorrection):
        tokens = scored_tokens(policy, batch, passes, correction, obrs_lambda, job_seed, chunk_tokens, how)
        weights = obrs_weights(tokens, correction, reference_logprobs=None, ranks=how.ranks)
    else:
        logprobs = _sampled_logprobs(policy, batch, passes, chunk_tokens, how)
        tokens = replace(batch.tokens, reference_logprobs=logprobs, topk_mass=logprobs.exp())
        weights = reference_target_weights(tokens, correction, how.ranks)
    return OwnReference(replace(batch, tokens=tokens), weights, only)


@torch.no_grad()
def _sampled_logprobs(
    policy: PreTrainedModel, batch: Batch, passes: Sequence[MicroRows], chunk_tokens: int, how: ScoringPass
) -> Tensor:
    logprobs = torch.zeros(batch.num_tokens)
    for one in passes:
        index = batch.token_index(one.rows)
        hidden = how.states(policy, *batch.inputs(one))
        ids = batch.tokens.token_ids[index].to(hidden.device)
        scores = token_logprobs(
            hidden, output_head(policy), ids, temperature=batch.temperature, chunk_tokens=chunk_tokens
        )
        if one.counted:
            logprobs[index] = scores.logprobs.float().cpu()
    if how.releases:
        release(policy)
    how.ranks.sum_(logprobs)
    return logprobs
