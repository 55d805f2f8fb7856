"""Log-probabilities over the vocabulary, one slice of tokens at a time: [tokens, vocabulary] is never held.

The numbers equal ``log_softmax(logits / temperature)``, accumulated in float32 for every model format. Scores carry no
gradient; :func:`differentiable_token_logprobs` recomputes its slices in the backward pass.

Two kernels share one interface and the same tests: ``torch`` processes slices of tokens and runs anywhere; ``triton``
keeps logits entirely on the chip (:mod:`jackpot.algorithm.vocabulary_triton`) and needs a GPU and half precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jackpot.algorithm.output_head import (
    DEFAULT_CHUNK_TOKENS,
    HeadGradients,
    OutputHead,
    VocabularyKernel,
    log_normalize_,
    slice_logits,
    softcap_slope,
    token_slices,
    uses_triton,
    widened,
)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class VocabularyScores:
    """One pass over the vocabulary at T positions; float32."""

    logprobs: Tensor  # shape of the requested ids
    topk_ids: Tensor | None  # [T, k] int64, most probable first
    topk_logprobs: Tensor | None  # [T, k]
    entropy: Tensor | None  # [T], in nats, without gradient


@torch.no_grad()
def token_logprobs(
    hidden: Tensor,
    head: OutputHead,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    top_k: int = 0,
    entropy: bool = False,
    kernel: VocabularyKernel = "auto",
) -> VocabularyScores:
    """The scoring kernel: log-probabilities at given ids and, from the same pass, the model's top-k (§4.4).

    Args:
        hidden: [T, H], the states that predict the tokens.
        head: the model's output layer.
        ids: [T] or [T, n] int64.
        temperature: divides the logits.
        chunk_tokens: tokens per slice, see :func:`token_slices`.
        top_k: how many of the most probable tokens to return, limited to the vocabulary; 0 for none.
        entropy: whether to return the entropy.
        kernel: the implementation; see :func:`uses_triton`.
    """
    wanted = ids if ids.dim() == 2 else ids[:, None]
    if uses_triton(kernel, head, hidden):
        from jackpot.algorithm import vocabulary_triton

        logprobs, *others = vocabulary_triton.token_logprobs(
            hidden, head, wanted, temperature=temperature, top_k=top_k, entropy=entropy
        )
        return _scores(logprobs.view(ids.shape), *others)
    head, hidden = widened(head, hidden)
    k = min(top_k, len(head.weight))
    scores = _empty_scores(hidden, wanted.shape[1], k, entropy)
    for tokens in token_slices(len(hidden), len(head.weight), chunk_tokens):
        logits = slice_logits(head, hidden[tokens], temperature)
        scores.logprobs[tokens] = logits.gather(1, wanted[tokens])
        if scores.topk_ids is not None and scores.topk_logprobs is not None:
            scores.topk_logprobs[tokens], scores.topk_ids[tokens] = logits.topk(k, dim=-1)
        # Last, because it overwrites the logits: a slice never needs a second array of its size.
        log_sum = _reduce_(logits, None if scores.entropy is None else scores.entropy[tokens])
        scores.logprobs[tokens] -= log_sum
        if scores.topk_logprobs is not None:
            scores.topk_logprobs[tokens] -= log_sum
    return _scores(scores.logprobs.view(ids.shape), scores.topk_ids, scores.topk_logprobs, scores.entropy)


def _scores(
    logprobs: Tensor, topk_ids: Tensor | None, topk_logprobs: Tensor | None, entropy: Tensor | None
) -> VocabularyScores:
    return VocabularyScores(logprobs=logprobs, topk_ids=topk_ids, topk_logprobs=topk_logprobs, entropy=entropy)


def _empty_scores(hidden: Tensor, n: int, k: int, entropy: bool) -> VocabularyScores:
    num_tokens, wide = len(hidden), torch.promote_types(hidden.dtype, torch.float32)
    return VocabularyScores(
        logprobs=hidden.new_empty(num_tokens, n, dtype=wide),
        topk_ids=hidden.new_empty(num_tokens, k, dtype=torch.int64) if k else None,
        topk_logprobs=hidden.new_empty(num_tokens, k, dtype=wide) if k else None,
        entropy=hidden.new_empty(num_tokens, dtype=wide) if entropy else None,
    )


def iterate_logprobs(
    hidden: Tensor, head: OutputHead, *, temperature: float = 1.0, chunk_tokens: int = DEFAULT_CHUNK_TOKENS
) -> Iterator[tuple[slice, Tensor]]:
    """Whole rows of log-probabilities, one slice of tokens at a time: (tokens, [c, V]), without gradient.

    Iterators over two models with the same vocabulary and number of tokens give the same slices, so the full normalizer
    is a loop over their ``zip``. The caller may overwrite a slice's rows.
    """
    head, hidden = widened(head, hidden)
    for tokens in token_slices(len(hidden), len(head.weight), chunk_tokens):
        with torch.no_grad():
            rows = log_normalize_(slice_logits(head, hidden[tokens], temperature))
        yield tokens, rows


def differentiable_token_logprobs(
    hidden: Tensor,
    head: OutputHead,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    entropy: bool = False,
    kernel: VocabularyKernel = "auto",
) -> VocabularyScores:
    """Log-probabilities at given ids with gradients to ``hidden``, ``head.weight`` and ``head.bias``.

    Arguments as for :func:`token_logprobs`. The backward pass recomputes each slice. The entropy has no gradient.
    """
    wanted = ids if ids.dim() == 2 else ids[:, None]
    if uses_triton(kernel, head, hidden):
        from jackpot.algorithm import vocabulary_triton

        logprobs, entropies = vocabulary_triton.differentiable_token_logprobs(
            hidden, head, wanted, temperature=temperature, entropy=entropy
        )
    else:
        logprobs, entropies = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, wanted, head, temperature, chunk_tokens, entropy
        )
    return _scores(logprobs.view(ids.shape), None, None, entropies if entropy else None)


class _TokenLogprobs(torch.autograd.Function):
    """log p(id) = z_id − log Σ exp z, whose gradient in z is onehot(id) − p."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        head: OutputHead,
        temperature: float,
        chunk_tokens: int,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        wide_head, wide_hidden = widened(head, hidden)
        scores = _empty_scores(wide_hidden, ids.shape[1], 0, entropy)
        for tokens in token_slices(len(hidden), len(head.weight), chunk_tokens):
            logits = slice_logits(wide_head, wide_hidden[tokens], temperature)
            scores.logprobs[tokens] = logits.gather(1, ids[tokens])
            scores.logprobs[tokens] -= _reduce_(logits, None if scores.entropy is None else scores.entropy[tokens])
        ctx.save_for_backward(hidden, weight, *(() if bias is None else (bias,)), ids)
        ctx.settings = (head.softcap, head.scale, temperature, chunk_tokens)
        entropies = hidden.new_empty(0) if scores.entropy is None else scores.entropy
        ctx.mark_non_differentiable(entropies)
        return scores.logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _entropy_gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *bias, ids = ctx.saved_tensors
        softcap, scale, temperature, chunk_tokens = ctx.settings
        head, wide_hidden = widened(OutputHead(weight, bias[0] if bias else None, softcap, scale), hidden)
        gradients = HeadGradients(head, wide_hidden, ctx.needs_input_grad[:3])
        for tokens in token_slices(len(hidden), len(head.weight), chunk_tokens):
            logits = slice_logits(head, wide_hidden[tokens], temperature)
            slope = softcap_slope(head, logits, temperature)
            in_logits = log_normalize_(logits).exp_().mul_(-gradient[tokens].sum(-1, keepdim=True))
            in_logits.scatter_add_(1, ids[tokens], gradient[tokens])
            gradients.add(tokens, in_logits, slope, temperature)
        return (*gradients.like(hidden, weight, *bias), None, None, None, None, None)


def _reduce_(logits: Tensor, entropy: Tensor | None) -> Tensor:
    """log Σ exp of each row, [c, 1]; overwrites the logits [c, V] and fills ``entropy`` [c] if given."""
    greatest = logits.amax(-1, keepdim=True)
    shifted = logits.sub_(greatest)
    if entropy is None:
        return shifted.exp_().sum(-1, keepdim=True).log_().add_(greatest)
    exponentials = shifted.exp()
    total = exponentials.sum(-1, keepdim=True)
    # H = log Σ e^s − Σ s·e^s / Σ e^s
    mean_shifted = exponentials.mul_(shifted).sum(-1, keepdim=True) / total
    entropy.copy_((total.log() - mean_shifted)[:, 0])
    return total.log_().add_(greatest)
