"""Forward passes over runs of completion tokens, batched by length, down to hidden states or log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from jackpot.algorithm.vocabulary import token_logprobs
from jackpot.compute.batching import AttentionCost, ModelPass, Siblings, plan_rows
from jackpot.compute.forward import completion_hidden, packed_completion_hidden
from jackpot.compute.models import output_head
from jackpot.compute.ranks.partition import plan_packed
from jackpot.scoring.tokens import Run


@dataclass(frozen=True, slots=True)
class PassSettings:
    """How passes are laid out, and the sampling temperature."""

    max_batch_tokens: int
    """Of a forward pass."""
    chunk_tokens: int
    """Of a slice of the vocabulary pass."""
    temperature: float
    attention: AttentionCost | None = None
    """What attention costs; None: no runs share a row."""
    packed: bool = False
    """Runs that share no prompt lie in one row a pass, without padding: for models that attend by lengths."""

    def apart(self) -> PassSettings:
        """The same, but every run in a row of its own: for the actor, which is not asked what it can do."""
        return replace(self, attention=None, packed=False)


@dataclass(frozen=True, slots=True, eq=False)
class LookedUp:
    """What a model says at N positions."""

    logprobs: Tensor  # [N, n] at the ids asked for
    top_ids: Tensor  # [N, m] int64, the model's own most probable tokens
    top_logprobs: Tensor  # [N, m]


def num_passes(runs: Sequence[Run], settings: PassSettings) -> int:
    """How many forward passes the runs take."""
    return len(_passes(runs, settings))


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
    passes = _passes(runs, settings)
    states = packed_completion_hidden if settings.packed else completion_hidden
    for one in passes:
        own = [runs[place] for place in one.sequences]
        hidden = states(model, [run.input_ids() for run in own], [run.num_known for run in own], one.per_row)
        yield torch.cat([run.places() for run in own]).to(model.device), hidden
    for _ in range(least_passes - len(passes)):
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


def _passes(runs: Sequence[Run], settings: PassSettings) -> list[ModelPass]:
    """Runs of one prompt may share a row if they begin with the completion: what each knows is then the prompt."""
    if not runs:
        return []
    siblings = None
    if settings.attention is not None and all(run.start == 0 for run in runs):
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(_prompt, runs)))}
        prompts = [numbers[_prompt(run)] for run in runs]
        siblings = Siblings(prompts, [run.num_known for run in runs], settings.attention)
    plan = plan_packed if settings.packed else plan_rows
    return plan([run.num_inputs for run in runs], settings.max_batch_tokens, siblings)


def _prompt(run: Run) -> bytes:
    return run.prompt_token_ids.tobytes()


_FILLER = np.zeros(2, dtype=np.int64)  # a prompt and a completion of one token each
