"""The forward passes of one rank through a model: hidden states, and log-probabilities of the tokens they predict."""

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
from jackpot.scoring.tokens import SequenceSlice


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringRule:
    """What is asked about each token."""

    obrs: JackpotCorrection | None
    """None: log p_t alone, and everything is accepted."""
    job_seed: int
    temperature: float
    chunk_tokens: int
    """Slice of a pass over the vocabulary."""
    whole_rows: bool
    """Whether whole rows of both models are looked at, from which the actor's candidates are found again."""
    actor_top_k: int
    """How many of these."""

    @classmethod
    def of_job(cls, job: JobSpec, temperature: float, *, whole_rows: bool = False) -> ScoringRule:
        """That of a job, for tokens that were sampled at ``temperature``. The full normalizer takes whole rows."""
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
    """Sequences on their way through a model: which of them together, and how they become hidden states."""

    model: PreTrainedModel
    sequences: Sequence[SequenceSlice]
    passes: Sequence[ModelPass]
    """Those that this rank makes; as many on every rank."""
    states: CompletionStates = completion_hidden

    def hidden(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass at a time: where its tokens lie among the N, [n] int64 on the CPU, and their states, [n, H].

        A filler is passed, for the other ranks' sake, and left out.
        """
        for model_pass in self.passes:
            hidden = self.states_of(model_pass)
            if model_pass.counted:
                yield token_places(self.sequences, model_pass), hidden

    def states_of(self, model_pass: ModelPass) -> Tensor:
        """The states of one pass, [n, H]."""
        return self.states(self.model, *model_inputs(self.sequences, model_pass))

    def at_ids(self, hidden: Tensor, ids: Tensor, rule: ScoringRule, top_k: int = 0) -> VocabularyScores:
        """Log-probabilities at ``ids`` [n] or [n, m] for states of one pass, and the model's own top-k there."""
        # The head is asked for at every pass: a sharded model has its own only from a pass on.
        head, ids = output_head(self.model), ids.to(hidden.device)
        return token_logprobs(
            hidden, head, ids, temperature=rule.temperature, chunk_tokens=rule.chunk_tokens, top_k=top_k
        )

    def lend(self, states: Tensor) -> ModelPasses:
        """The same where the only pass has been made, with these states."""
        assert len(self.passes) == 1
        return replace(self, states=lambda *_: states)


def token_places(sequences: Sequence[SequenceSlice], model_pass: ModelPass) -> Tensor:
    """Where the tokens of a pass lie in the flat arrays, in the order of its hidden states; int64."""
    chosen = [sequences[number] for number in model_pass.sequences]
    return torch.cat([torch.arange(sequence.start, sequence.end) for sequence in chosen])


def rows_of(places: Sequence[Tensor], num_tokens: int) -> Tensor:
    """The row that each of this rank's tokens has, by its place among the N."""
    listed = torch.cat([torch.zeros(0, dtype=torch.int64), *places])
    row_of = torch.zeros(num_tokens, dtype=torch.int64)
    row_of[listed] = torch.arange(len(listed))
    return row_of


def model_inputs(
    sequences: Sequence[SequenceSlice], model_pass: ModelPass
) -> tuple[list[NDArray[np.int64]], list[int], Sequence[int]]:
    """What :data:`CompletionStates` takes of a pass: ids [P + T], prompt lengths P, and how many lie in each row."""
    chosen = [sequences[number] for number in model_pass.sequences]
    return (
        [sequence.input_ids for sequence in chosen],
        [sequence.prompt_length for sequence in chosen],
        model_pass.per_row,
    )


def siblings_by_prompt(sequences: Sequence[SequenceSlice], attention: AttentionCost) -> Siblings:
    """Which whole sequences begin with the same prompt."""
    prompts = [sequence.input_ids[: sequence.prompt_length].tobytes() for sequence in sequences]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    lengths = [sequence.prompt_length for sequence in sequences]
    return Siblings([numbers[prompt] for prompt in prompts], lengths, attention)
