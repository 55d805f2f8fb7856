"""The vocabulary passes as fused GPU programs: the interface of :mod:`jackpot.algorithm.vocabulary` and of
:func:`jackpot.algorithm.distillation.forward_kl`, which call this module where Triton can run.

Forward: logits exist one tile at a time, on the chip. Backward: a tile of their gradient, [tokens, COLUMNS] in the
weight's format, goes to memory and from there through two matrix products. What is held beyond inputs and gradients
is therefore independent of the vocabulary (with top-k: a sixteenth of a slice's logits).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from jackpot.algorithm import vocabulary_kernels as kernels
from jackpot.algorithm.output_head import OutputHead, matmul

# Tiles of 128 × 128 × 64 in half precision fill an H100's tensor cores and fit twice into its shared memory.
BLOCK_T, BLOCK_V, BLOCK_H = 128, 128, 64
LAUNCH = {"num_warps": 8, "num_stages": 3}
# The forward KL holds two accumulators, so half of the rows.
KL_BLOCK_T = 64

GROUP = 16
"""Neighbouring tokens of which the forward pass keeps the greatest logit, when the most probable are asked for."""

TOKENS = 8192
"""Tokens per launch. With :data:`COLUMNS` this bounds the buffer of gradients: 64 MB in 16 bits."""

TOPK_TOKENS = 2048
"""The same when group maxima are kept: 2048 × 152,000 / 16 × 4 bytes = 78 MB."""

COLUMNS = 4096
"""Columns of the vocabulary whose gradient is in memory at once."""

PROGRAMS = 512
"""Programs that a launch should have at least, lest a GPU's processors stay idle: a few for each of 132."""


class _Head:
    """An output layer as the programs take it."""

    def __init__(self, head: OutputHead, hidden: Tensor) -> None:
        self.weight = head.weight.detach().contiguous()
        self.hidden = hidden.detach().to(self.weight.dtype).contiguous()
        # A pointer is needed, whether it is read or not.
        self.bias = self.weight if head.bias is None else head.bias.detach().contiguous()
        self.has_bias = head.bias is not None
        self.scale, self.softcap = head.scale, head.softcap
        self.vocabulary, self.width = self.weight.shape

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias

    @property
    def shape(self) -> tuple[float, float]:
        return self.scale, 1.0 if self.softcap is None else self.softcap

    @property
    def flags(self) -> tuple[bool, bool]:
        return self.has_bias, self.softcap is not None


def token_logprobs(
    hidden: Tensor, head: OutputHead, ids: Tensor, *, temperature: float, top_k: int, entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As :func:`jackpot.algorithm.vocabulary.token_logprobs`, for ids [T, n]: log-probabilities [T, n], the most
    probable ids [T, k] and theirs [T, k], entropy [T]."""
    with torch.cuda.device_of(hidden):  # type: ignore[no-untyped-call] # programs start on the current device, not on that of their arguments
        return _token_logprobs(_Head(head, hidden), hidden, ids, temperature, top_k, entropy)


def _token_logprobs(
    made: _Head, hidden: Tensor, ids: Tensor, temperature: float, top_k: int, entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    k = min(top_k, made.vocabulary)
    logprobs = hidden.new_empty(ids.shape, dtype=torch.float32)
    topk_ids = hidden.new_empty(len(hidden), k, dtype=torch.int64) if k else None
    topk_logprobs = hidden.new_empty(len(hidden), k, dtype=torch.float32) if k else None
    entropies = hidden.new_empty(len(hidden), dtype=torch.float32) if entropy else None
    for tokens in _slices(len(hidden), TOPK_TOKENS if k else TOKENS):
        states = made.hidden[tokens]
        log_sum, mean_logit, groups = _log_sums(made, states, temperature, entropy=entropy, groups=k > 0)
        logprobs[tokens] = _chosen_logits(made, states, ids[tokens], temperature) - log_sum[:, None]
        if entropies is not None and mean_logit is not None:
            entropies[tokens] = log_sum - mean_logit
        if topk_ids is not None and topk_logprobs is not None and groups is not None:
            found_ids, logits = _most_probable(made, states, groups, k, temperature)
            topk_ids[tokens], topk_logprobs[tokens] = found_ids, logits - log_sum[:, None]
    return logprobs, topk_ids, topk_logprobs, entropies


def differentiable_token_logprobs(
    hidden: Tensor, head: OutputHead, ids: Tensor, *, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    """As :func:`jackpot.algorithm.vocabulary.differentiable_token_logprobs`, for ids [T, n]: log-probabilities and
    entropies, the latter empty unless asked for."""
    with torch.cuda.device_of(hidden):  # type: ignore[no-untyped-call]
        result: tuple[Tensor, Tensor] = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, ids, head, temperature, entropy
        )
    return result


def forward_kl(
    policy_hidden: Tensor, policy_head: OutputHead, actor_hidden: Tensor, actor_head: OutputHead, *, temperature: float
) -> Tensor:
    """As :func:`jackpot.algorithm.distillation.forward_kl`."""
    with torch.cuda.device_of(actor_hidden):  # type: ignore[no-untyped-call]
        result: Tensor = _ForwardKl.apply(  # type: ignore[no-untyped-call]
            actor_hidden, actor_head.weight, actor_head.bias, actor_head, policy_hidden, policy_head, temperature
        )
    return result


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        head: OutputHead,
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        made = _Head(head, hidden)
        log_sum = hidden.new_empty(len(hidden), dtype=torch.float32)
        logprobs = hidden.new_empty(ids.shape, dtype=torch.float32)
        entropies = hidden.new_empty(len(hidden) if entropy else 0, dtype=torch.float32)
        for tokens in _slices(len(hidden), TOKENS):
            states = made.hidden[tokens]
            log_sum[tokens], mean_logit, _ = _log_sums(made, states, temperature, entropy=entropy, groups=False)
            logprobs[tokens] = _chosen_logits(made, states, ids[tokens], temperature) - log_sum[tokens, None]
            if mean_logit is not None:
                entropies[tokens] = log_sum[tokens] - mean_logit
        ctx.save_for_backward(hidden, weight, *(() if bias is None else (bias,)), ids, log_sum)
        ctx.settings = (head.softcap, head.scale, temperature)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _entropy_gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *bias, ids, log_sum = ctx.saved_tensors
        softcap, scale, temperature = ctx.settings
        made = _Head(OutputHead(weight, bias[0] if bias else None, softcap, scale), hidden)
        gradient = gradient.contiguous()
        gradient_sum = gradient.sum(-1)

        def tile(tokens: slice, first: int, out: Tensor) -> None:
            kernels.logprob_gradient_kernel[_grid(out, BLOCK_T)](
                made.hidden[tokens],
                *made.tensors,
                ids[tokens].contiguous(),
                gradient[tokens],
                gradient_sum[tokens],
                log_sum[tokens],
                out,
                first,
                out.shape[1],
                len(out),
                made.vocabulary,
                made.width,
                *made.shape,
                1.0 / temperature,
                ids.shape[1],
                *made.flags,
                BLOCK_T,
                BLOCK_V,
                BLOCK_H,
                **LAUNCH,
            )

        return (*_gradients(made, hidden, bias[0] if bias else None, ctx.needs_input_grad[:3], tile), *[None] * 4)


class _ForwardKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: OutputHead,
        policy_hidden: Tensor,
        policy_head: OutputHead,
        temperature: float,
    ) -> Tensor:
        policy, actor = _Head(policy_head, policy_hidden), _Head(head, hidden)
        divergence, policy_log_sum, actor_log_sum = (
            hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3)
        )
        for tokens in _slices(len(hidden), TOKENS):
            divergence[tokens], policy_log_sum[tokens], actor_log_sum[tokens] = _kl_sums(
                policy, actor, tokens, temperature
            )
        ctx.save_for_backward(hidden, weight, *(() if bias is None else (bias,)), policy_log_sum, actor_log_sum)
        ctx.policy, ctx.settings = policy, (head.softcap, head.scale, temperature)
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *bias, policy_log_sum, actor_log_sum = ctx.saved_tensors
        softcap, scale, temperature = ctx.settings
        policy = ctx.policy
        actor = _Head(OutputHead(weight, bias[0] if bias else None, softcap, scale), hidden)
        gradient = gradient.contiguous()

        def tile(tokens: slice, first: int, out: Tensor) -> None:
            kernels.forward_kl_gradient_kernel[_grid(out, KL_BLOCK_T)](
                policy.hidden[tokens],
                *policy.tensors,
                actor.hidden[tokens],
                *actor.tensors,
                gradient[tokens],
                policy_log_sum[tokens],
                actor_log_sum[tokens],
                out,
                first,
                out.shape[1],
                len(out),
                actor.vocabulary,
                policy.width,
                actor.width,
                *policy.shape,
                *actor.shape,
                1.0 / temperature,
                *policy.flags,
                *actor.flags,
                KL_BLOCK_T,
                BLOCK_V,
                BLOCK_H,
                **LAUNCH,
            )

        return (*_gradients(actor, hidden, bias[0] if bias else None, ctx.needs_input_grad[:3], tile), *[None] * 4)


def _log_sums(
    made: _Head, states: Tensor, temperature: float, *, entropy: bool, groups: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log Σ exp z and Σ p z of each state, [c] each, and the greatest logit of each group of neighbours."""
    num_tokens, num_tiles = len(states), triton.cdiv(made.vocabulary, BLOCK_V)
    num_splits, tiles_per_split = _splits(num_tokens, BLOCK_T, num_tiles)
    greatest, total, weighted = states.new_empty(3, num_splits, num_tokens, dtype=torch.float32)
    best = states.new_empty(num_tokens, num_tiles * BLOCK_V // GROUP, dtype=torch.float32) if groups else None
    kernels.log_sum_kernel[(triton.cdiv(num_tokens, BLOCK_T), num_splits)](
        states,
        *made.tensors,
        greatest,
        total,
        weighted,
        greatest if best is None else best,
        num_tokens,
        made.vocabulary,
        made.width,
        num_tiles,
        tiles_per_split,
        *made.shape,
        1.0 / temperature,
        *made.flags,
        entropy,
        groups,
        GROUP,
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
        **LAUNCH,
    )
    log_sum, share = _combined(greatest, total)
    return log_sum, (weighted * share).sum(0) if entropy else None, best


def _kl_sums(policy: _Head, actor: _Head, tokens: slice, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """KL(policy ‖ actor) of each of the tokens, and both models' log Σ exp z; [c] each."""
    states = policy.hidden[tokens]
    num_tokens, num_tiles = len(states), triton.cdiv(actor.vocabulary, BLOCK_V)
    num_splits, tiles_per_split = _splits(num_tokens, KL_BLOCK_T, num_tiles)
    sums = states.new_empty(5, num_splits, num_tokens, dtype=torch.float32)
    kernels.forward_kl_kernel[(triton.cdiv(num_tokens, KL_BLOCK_T), num_splits)](
        states,
        *policy.tensors,
        actor.hidden[tokens],
        *actor.tensors,
        *sums,
        num_tokens,
        actor.vocabulary,
        policy.width,
        actor.width,
        num_tiles,
        tiles_per_split,
        *policy.shape,
        *actor.shape,
        1.0 / temperature,
        *policy.flags,
        *actor.flags,
        KL_BLOCK_T,
        BLOCK_V,
        BLOCK_H,
        **LAUNCH,
    )
    policy_log_sum, share = _combined(sums[0], sums[1])
    actor_log_sum, _ = _combined(sums[3], sums[4])
    # KL = E_p[z_p − z_ω] − log Σ e^z_p + log Σ e^z_ω
    return (sums[2] * share).sum(0) - policy_log_sum + actor_log_sum, policy_log_sum, actor_log_sum


def _combined(greatest: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """From splits [S, c]: log Σ exp z, [c], and what a split's weighted sum counts towards the mean, [S, c]."""
    highest = greatest.amax(0)
    shrink = (greatest - highest).exp()
    whole = (total * shrink).sum(0)
    return highest + whole.log(), shrink / whole


def _chosen_logits(made: _Head, states: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Final logits at ids [c, n]; −inf beyond the vocabulary."""
    num_tokens, num_ids = ids.shape
    out = states.new_empty(ids.shape, dtype=torch.float32)
    block = min(32, triton.next_power_of_2(num_ids))
    kernels.chosen_logits_kernel[(num_tokens, triton.cdiv(num_ids, block))](
        states,
        *made.tensors,
        ids.contiguous(),
        out,
        num_ids,
        made.vocabulary,
        made.width,
        *made.shape,
        1.0 / temperature,
        *made.flags,
        block,
        min(256, triton.next_power_of_2(made.width)),
    )
    return out


def _most_probable(made: _Head, states: Tensor, groups: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The k most probable ids [c, k] and their logits, from each group's greatest logit.

    A token outside of the k best groups has k tokens above it, so only those groups need to be looked into.
    """
    best = groups.topk(min(k, groups.shape[1]), dim=-1).indices
    members = torch.arange(GROUP, device=groups.device)
    candidates = (best[:, :, None] * GROUP + members).flatten(1)
    logits, places = _chosen_logits(made, states, candidates, temperature).topk(k, dim=-1)
    return candidates.gather(1, places), logits


def _gradients(
    made: _Head, hidden: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool], tile: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias, from tiles of the gradient of W h + b.

    ``tile(tokens, first, out)`` fills ``out`` [c, columns] for the columns from ``first`` on.
    """
    num_tokens = len(hidden)
    in_hidden = torch.zeros_like(made.hidden, dtype=torch.float32) if needs[0] else None
    # One slice of tokens holds them all, or several are added up in float32.
    wide = torch.float32 if num_tokens > TOKENS else made.weight.dtype
    in_weight = torch.zeros_like(made.weight, dtype=wide) if needs[1] else None
    in_bias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] and bias is not None else None
    for tokens in _slices(num_tokens, TOKENS):
        states = made.hidden[tokens]
        for first in range(0, made.vocabulary, COLUMNS):
            columns = slice(first, min(first + COLUMNS, made.vocabulary))
            out = made.weight.new_empty(len(states), columns.stop - first)
            tile(tokens, first, out)
            if in_hidden is not None:
                in_hidden[tokens] += _product(out, made.weight[columns])
            if in_weight is not None:
                in_weight[columns] += _product(out.t(), states).to(wide)
            if in_bias is not None:
                in_bias[columns] += out.sum(0, dtype=torch.float32)
    return (
        None if in_hidden is None else in_hidden.to(hidden.dtype),
        None if in_weight is None else in_weight.to(made.weight.dtype),
        None if in_bias is None or bias is None else in_bias.to(bias.dtype),
    )


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left · right in float32; on a CPU, where the interpreter runs, of converted operands."""
    return matmul(left, right) if left.is_cuda else left.float() @ right.float()


def _slices(num_tokens: int, size: int) -> Iterator[slice]:
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def _splits(num_tokens: int, block: int, num_tiles: int) -> tuple[int, int]:
    """Into how many splits of how many tiles the vocabulary goes, for a launch to have enough programs."""
    wanted = max(1, min(num_tiles, PROGRAMS // triton.cdiv(num_tokens, block)))
    tiles_per_split = triton.cdiv(num_tiles, wanted)
    return triton.cdiv(num_tiles, tiles_per_split), tiles_per_split


def _grid(out: Tensor, block: int) -> tuple[int, int]:
    return triton.cdiv(out.shape[0], block), triton.cdiv(out.shape[1], BLOCK_V)
