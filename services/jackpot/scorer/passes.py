"""Forward passes over runs of completion tokens, batched by length, down to hidden states or log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.algorithm.vocabulary import token_logprobs
from jackpot.runtime.batching import length_buckets
from jackpot.runtime.forward import completion_hidden
from jackpot.runtime.models import output_head
from jackpot.scorer.tokens import Run


@dataclass(frozen=True, slots=True)
class PassSettings:
    """How many tokens a forward pass and a slice of the vocabulary pass may have, and the sampling temperature."""

    max_batch_tokens: int
    chunk_tokens: int
    temperature: float


@dataclass(frozen=True, slots=True, eq=False)
class LookedUp:
    """What a model says at N positions."""

    logprobs: Tensor  # [N, n] at the ids asked for
    top_ids: Tensor  # [N, m] int64, the model's own most probable tokens
    top_logprobs: Tensor  # [N, m]


def hidden_by_pass(
    model: PreTrainedModel, runs: Sequence[Run], settings: PassSettings
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states that predict the tokens of the runs, one forward pass at a time.

    Yields:
        (where, hidden): the tokens' places among the N, [n] int64, and their hidden states, [n, H].
    """
    for bucket in length_buckets([run.num_inputs for run in runs], settings.max_batch_tokens):
        rows = [runs[place] for place in bucket]
        hidden = completion_hidden(model, [run.input_ids() for run in rows], [run.num_known for run in rows])
        yield torch.cat([run.places() for run in rows]).to(model.device), hidden


def flat_hidden(model: PreTrainedModel, runs: Sequence[Run], num_tokens: int, settings: PassSettings) -> Tensor:
    """The same for all runs at once: [N, H]."""
    passes = list(hidden_by_pass(model, runs, settings))
    flat = torch.empty(num_tokens, passes[0][1].shape[1], dtype=passes[0][1].dtype, device=model.device)
    for where, hidden in passes:
        flat[where] = hidden
    return flat


def look_up(
    model: PreTrainedModel, runs: Sequence[Run], ids: Tensor, settings: PassSettings, *, top_k: int = 0
) -> LookedUp:
    """Log-probabilities at ``ids`` [N, n] for the tokens of the runs, and the model's own ``top_k`` there.

    Rows of tokens outside the runs are zero.
    """
    head = output_head(model)
    num_tokens, n = ids.shape
    m = min(top_k, len(head.weight))
    found = LookedUp(
        logprobs=torch.zeros(num_tokens, n, device=model.device),
        top_ids=torch.zeros(num_tokens, m, dtype=torch.int64, device=model.device),
        top_logprobs=torch.zeros(num_tokens, m, device=model.device),
    )
    for where, hidden in hidden_by_pass(model, runs, settings):
        scores = token_logprobs(
            hidden,
            head,
            ids[where],
            temperature=settings.temperature,
            chunk_tokens=settings.chunk_tokens,
            top_k=m,
        )
        found.logprobs[where] = scores.logprobs
        if scores.topk_ids is not None and scores.topk_logprobs is not None:
            found.top_ids[where] = scores.topk_ids
            found.top_logprobs[where] = scores.topk_logprobs
    return found
