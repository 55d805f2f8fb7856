"""The penalty on KL to the initial policy as a part of the reward: R(y) − β·log(p_ref(y)/p_initial(y)).

In the loss a token answers for its own divergence alone; in the reward for that of what it leads to as well. The
log-ratio itself, k1, is the estimate here: a reward's gradient comes from the score of the completion, and that of
k2 or k3 would be of another divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.algorithm.objective import kl_penalty
from jackpot.algorithm.vocabulary import token_logprobs
from jackpot.compute.batching import ModelPass
from jackpot.compute.forward import CompletionStates
from jackpot.compute.models import output_head
from jackpot.compute.ranks.group import Ranks
from jackpot.compute.ranks.sharding import release
from jackpot.config import AlgorithmConfig
from jackpot.scoring.batch import Batch
from jackpot.scoring.passes import model_inputs, token_places


@dataclass(frozen=True, slots=True, eq=False)
class InitialPass:
    """How tokens are looked at under the policy as the job began."""

    initial: PreTrainedModel
    states: CompletionStates
    chunk_tokens: int  # slice of the vocabulary pass
    ranks: Ranks  # who has the other sequences


def kl_in_reward(
    batch: Batch, parts: Sequence[tuple[Batch, Sequence[ModelPass]]], algorithm: AlgorithmConfig, how: InitialPass
) -> Batch:
    """The batch with log p_initial of its tokens, and with advantages of rewards less the penalty.

    Its ``rewards`` stay the task's. A collective: every rank gets all advantages.

    Args:
        batch: with log p_ref of this rank's tokens.
        parts: the batch split into optimizer steps, each with this rank's passes.
        algorithm: the advantage estimator, and β.
        how: the pass under the initial policy.
    """
    figures_by_part = [_initial_and_divergence(part, passes, how) for part, passes in parts]
    logprobs, divergence = torch.cat(figures_by_part, dim=1)
    release(how.initial)
    how.ranks.sum_(divergence)
    sequence_index = batch.tokens.sequence_index
    sums = torch.zeros(len(batch.sequences), dtype=torch.float64).index_add_(0, sequence_index, divergence.double())
    sizes = torch.from_numpy(np.diff([*batch.group_starts, len(batch.sequences)]))
    advantages = algorithm.advantage.estimate(
        torch.from_numpy(batch.rewards) - algorithm.kl_penalty.weight * sums,
        torch.arange(len(sizes)).repeat_interleave(sizes),
        torch.tensor([sequence.end - sequence.start for sequence in batch.sequences]),
    )
    tokens = replace(batch.tokens, advantages=advantages.float()[sequence_index], initial_logprobs=logprobs)
    return replace(batch, tokens=tokens)


def _initial_and_divergence(batch: Batch, passes: Sequence[ModelPass], how: InitialPass) -> Tensor:
    """log p_initial and log(p_ref/p_initial), [2, N]; 0 for another rank's tokens, so that ranks can be summed up."""
    figures = torch.zeros(2, batch.num_tokens)
    for model_pass in passes:
        logprobs = sampled_logprobs(how.initial, how.states, batch, model_pass, how.chunk_tokens).float().cpu()
        if model_pass.counted:
            index = token_places(batch.sequences, model_pass)
            divergence = kl_penalty(batch.tokens.reference_logprobs[index], logprobs, "k1").value
            figures[:, index] = torch.stack([logprobs, divergence])
    return figures


@torch.no_grad()
def sampled_logprobs(
    model: PreTrainedModel, states: CompletionStates, batch: Batch, model_pass: ModelPass, chunk_tokens: int
) -> Tensor:
    """log-probabilities of a pass's sampled tokens under a model that does not learn, [n] on its device."""
    hidden = states(model, *model_inputs(batch.sequences, model_pass))
    ids = batch.tokens.token_ids[token_places(batch.sequences, model_pass)].to(hidden.device)
    return token_logprobs(
        hidden, output_head(model), ids, temperature=batch.temperature, chunk_tokens=chunk_tokens
    ).logprobs
