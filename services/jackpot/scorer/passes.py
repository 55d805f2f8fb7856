"""Forward passes over runs of completion tokens, batched by length, down to hidden states or log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
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


def num_passes(runs: Sequence[Run], settings: PassSettings) -> int:
    """How many forward passes the runs take."""
    return len(_buckets(runs, settings))


def hidden_by_pass(
    model: PreTrainedModel, runs: Sequence[Run], settings: PassSettings, least_passes: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states that predict the tokens of the runs, one forward pass at a time.

    Args:
        model: what passes.
        runs: may be none.
        settings: how many tokens go together.
        least_passes: fillers make up for those that are missing: a sharded model's collectives need all ranks in every
            pass, and another rank may have more.

    Yields:
        (where, hidden): the tokens' places among the N, [n] int64, and their hidden states, [n, H].
    """
    buckets = _buckets(runs, settings)
    for bucket in buckets:
        rows = [runs[place] for place in bucket]
        hidden = completion_hidden(model, [run.input_ids() for run in rows], [run.num_known for run in rows])
        yield torch.cat([run.places() for run in rows]).to(model.device), hidden
    for _ in range(least_passes - len(buckets)):
        completion_hidden(model, [_FILLER], [1])


def flat_hidden(
    model: PreTrainedModel, runs: Sequence[Run], num_tokens: int, settings: PassSettings, least_passes: int = 0
) -> Tensor:
    """The same for all runs at once: [N, H]."""
    passes = list(hidden_by_pass(model, runs, settings, least_passes))
    flat = torch.empty(num_tokens, passes[0][1].shape[1], dtype=passes[0][1].dtype, device=model.device)
    for where, hidden in passes:
        flat[where] = hidden
    return flat


def look_up(
    model: PreTrainedModel,
    runs: Sequence[Run],
    ids: Tensor,
    settings: PassSettings,
    *,
    top_k: int = 0,
    least_passes: int = 0,
) -> LookedUp:
    """Log-probabilities at ``ids`` [N, n] for the tokens of the runs, and the model's own ``top_k`` there.

    Rows of tokens outside the runs are zero.
    """
    num_tokens, n = ids.shape
    m = min(top_k, len(output_head(model).weight))
    found = LookedUp(
        logprobs=torch.zeros(num_tokens, n, device=model.device),
        top_ids=torch.zeros(num_tokens, m, dtype=torch.int64, device=model.device),
        top_logprobs=torch.zeros(num_tokens, m, device=model.device),
    )
    for where, hidden in hidden_by_pass(model, runs, settings, least_passes):
        scores = token_logprobs(
            hidden,
            output_head(model),  # asked for anew: a sharded model has its own only from a pass on
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


def _buckets(runs: Sequence[Run], settings: PassSettings) -> list[list[int]]:
    return length_buckets([run.num_inputs for run in runs], settings.max_batch_tokens) if runs else []


_FILLER = np.zeros(2, dtype=np.int64)  # a prompt and a completion of one token each
