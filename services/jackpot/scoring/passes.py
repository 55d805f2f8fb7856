"""One rank's forward passes through a model: hidden states, and log-probabilities of the tokens that they predict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.algorithm.corrections.jackpot import JackpotCorrection
from jackpot.algorithm.vocabulary import VocabularyScores, token_logprobs
from jackpot.compute.batching import AttentionCost, ModelPass, Siblings
from jackpot.compute.forward import CompletionStates, completion_hidden
from jackpot.compute.models import output_head
from jackpot.config import JobSpec
from jackpot.scoring.batch import SequenceSlice


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringRule:
    """What to compute for each token."""

    obrs: JackpotCorrection | None
    """None: only log p_t, and every token is accepted."""
    job_seed: int
    temperature: float
    chunk_tokens: int
    """Tokens per slice of a pass over the vocabulary."""
    whole_rows: bool
    """Whether to read whole rows of both models, and to find the actor's candidates from its rows."""
    actor_top_k: int
    """How many candidates the actor has."""

    @classmethod
    def of_job(cls, job: JobSpec, temperature: float, *, whole_rows: bool = False) -> ScoringRule:
        """A job's rule for tokens that were sampled at ``temperature``. The full normalizer needs whole rows."""
        obrs = job.algorithm.correction.obrs
        return cls(
            obrs=obrs,
            whole_rows=obrs is not None and (whole_rows or obrs.normalizer == "full"),
            job_seed=job.seed,
            temperature=temperature,
            chunk_tokens=job.scorer.chunk_tokens,
            actor_top_k=job.rollout.top_logprobs,
        )


@dataclass(frozen=True, slots=True, eq=False)
class ModelPasses:
    """Sequences to run through a model: which ones together, and how they become hidden states."""

    model: PreTrainedModel
    sequences: Sequence[SequenceSlice]
    passes: Sequence[ModelPass]
    """This rank's passes; every rank has the same number."""
    states: CompletionStates = completion_hidden

    def hidden(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass at a time: its tokens' positions among the N, [n] int64 on the CPU, and their states, [n, H].

        A filler pass is run, because the other ranks run theirs, but not returned.
        """
        for model_pass in self.passes:
            hidden = self.states_of(model_pass)
            if model_pass.counted:
                yield token_places(self.sequences, model_pass), hidden

    def states_of(self, model_pass: ModelPass) -> Tensor:
        """The states of one pass, [n, H]."""
        return self.states(self.model, *model_inputs(self.sequences, model_pass))

    def at_ids(self, hidden: Tensor, ids: Tensor, rule: ScoringRule, top_k: int = 0) -> VocabularyScores:
        """Log-probabilities at ``ids`` [n] or [n, m] for the states of one pass, and the model's top-k there."""
        # The head is looked up at every pass: a sharded model has gathered it only after a pass.
        head, ids = output_head(self.model), ids.to(hidden.device)
        return token_logprobs(
            hidden, head, ids, temperature=rule.temperature, chunk_tokens=rule.chunk_tokens, top_k=top_k
        )

    def lend(self, states: Tensor) -> ModelPasses:
        """The same, reusing the states of the only pass."""
        assert len(self.passes) == 1
        return replace(self, states=lambda *_: states)


def token_places(sequences: Sequence[SequenceSlice], model_pass: ModelPass) -> Tensor:
    """Positions of a pass's tokens in the flat arrays, in the order of its hidden states; int64."""
    chosen = [sequences[number] for number in model_pass.sequences]
    return torch.cat([torch.arange(sequence.start, sequence.end) for sequence in chosen])


def rows_of(places: Sequence[Tensor], num_tokens: int) -> Tensor:
    """The row of each of this rank's tokens, by its position among the N."""
    listed = torch.cat([torch.zeros(0, dtype=torch.int64), *places])
    row_of = torch.zeros(num_tokens, dtype=torch.int64)
    row_of[listed] = torch.arange(len(listed))
    return row_of


def model_inputs(
    sequences: Sequence[SequenceSlice], model_pass: ModelPass
) -> tuple[list[NDArray[np.int64]], list[int], Sequence[int]]:
    """A pass's arguments for :data:`CompletionStates`: ids [P + T], prompt lengths P, and sequences per row."""
    chosen = [sequences[number] for number in model_pass.sequences]
    return (
        [sequence.input_ids for sequence in chosen],
        [sequence.prompt_length for sequence in chosen],
        model_pass.per_row,
    )


def siblings_by_prompt(sequences: Sequence[SequenceSlice], attention: AttentionCost) -> Siblings:
    """Which whole sequences start with the same prompt."""
    prompts = [sequence.input_ids[: sequence.prompt_length].tobytes() for sequence in sequences]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    lengths = [sequence.prompt_length for sequence in sequences]
    return Siblings([numbers[prompt] for prompt in prompts], lengths, attention)
