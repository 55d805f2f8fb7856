"""The vocabulary passes as fused GPU programs: the interface of :mod:`jackpot.algorithm.vocabulary` and of
:func:`jackpot.algorithm.distillation.forward_kl`, which call this module where Triton can run.

Forward: logits exist one tile at a time, on the chip, and leave it as two or three numbers per token and tile.
Backward: the logits' gradient for some columns of the vocabulary, in the weight's format, is written to memory and goes
through two matrix products. Beyond inputs and gradients, memory therefore holds a hundredth of the logits of
:data:`TOKENS` tokens and one such block (with top-k: an eighth of the logits of :data:`TOPK_TOKENS`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from jackpot.algorithm import vocabulary_kernels as kernels
from jackpot.algorithm.output_head import OutputHead

GROUP = 16
"""Size of the groups of neighbouring tokens whose two best the forward pass keeps, if top-k is requested."""

TOKENS = 8192
"""Tokens per launch."""

TOPK_TOKENS = 2048
"""Tokens per launch with top-k, which keeps each group's two best: 2048 × 152,000 / 16 × 8 bytes = 156 MB."""

BLOCK_ELEMENTS = 1 << 26
"""Logits whose gradient is in memory at a time: 128 MB in 16 bits, 8192 columns of the vocabulary for 8192 tokens."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the programs divide their work, given a GPU's shared memory and processors."""

    programs: int
    """Programs per launch: one per processor, each with many tiles."""
    rows: int
    """Tokens per tile."""
    columns: int
    """Columns of the vocabulary per tile."""
    num_stages: int
    """Steps of 128 bytes along the hidden dimension that shared memory holds while they are fetched or multiplied."""

    @property
    def launch(self) -> dict[str, int]:
        """The options of a launch."""
        return {"num_warps": 8, "num_stages": self.num_stages}


def tiles_for(shared_memory: int, programs: int, *, accumulators: int = 1, writes: bool = False) -> Tiles:
    """Tiles for a GPU.

    128 × 256 logits in float32 fill the registers of eight warps. With such tiles and four steps in shared memory an
    H100 multiplies as fast as with its library. With 128 × 128 and five steps, where a program has two tiles, it
    reaches nine tenths of that.

    Args:
        shared_memory: bytes available to a program.
        programs: the number of the GPU's processors.
        accumulators: tiles of logits that a program has at a time.
        writes: whether the program writes a tile, which passes through shared memory in 16 bits.
    """
    rows = 128
    columns = 256 if accumulators == 1 and shared_memory >= 160_000 else 128
    step = (rows + columns) * _STEP_BYTES
    free = shared_memory - _RESERVED_BYTES - (2 * rows * columns if writes else 0)
    return Tiles(programs, rows, columns, max(1, min(5, free // step)))


_STEP_BYTES = 128  # a row of the hardware's widest shared-memory layout
_RESERVED_BYTES = 2048  # barriers and data that reductions exchange between warps


@cache
def _tiles(device: int | None, dtype: torch.dtype, accumulators: int = 1, writes: bool = False) -> Tiles:
    if device is None or dtype.itemsize > 2:  # the interpreter or no tensor cores: for tests
        return Tiles(2, 64, 64, 1)
    properties = torch.cuda.get_device_properties(device)
    return tiles_for(
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        properties.multi_processor_count,
        accumulators=accumulators,
        writes=writes,
    )


class _Head:
    """An output layer in the form that the programs take."""

    def __init__(self, head: OutputHead, hidden: Tensor) -> None:
        if head.weight.dtype == torch.bfloat16 and not head.weight.is_cuda:
            raise ValueError("Triton's interpreter computes nonsense in bfloat16. Use kernel='torch' on a CPU")
        self.weight = head.weight.detach().contiguous()
        self.hidden = hidden.detach().to(self.weight.dtype).contiguous()
        # The programs need a pointer even if they do not read it.
        self.bias = self.weight if head.bias is None else head.bias.detach().contiguous()
        self.has_bias = head.bias is not None
        self.scale, self.softcap = head.scale, head.softcap
        self.vocabulary, self.width = self.weight.shape
        self.step = _STEP_BYTES // self.weight.element_size()

    def operands(
        self, tokens: slice, columns: slice, tiles: Tiles
    ) -> tuple[TensorDescriptor, TensorDescriptor, Tensor]:
        """Hidden states, weight and bias."""
        return (
            TensorDescriptor.from_tensor(self.hidden[tokens], [tiles.rows, self.step]),
            TensorDescriptor.from_tensor(self.weight[columns], [tiles.columns, self.step]),
            self.bias[columns] if self.has_bias else self.bias,
        )

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
    probable ids [T, k] and their log-probabilities [T, k], entropy [T]."""
    with torch.cuda.device_of(hidden):  # type: ignore[no-untyped-call] # programs start on the current device, not on that of their arguments
        return _token_logprobs(_Head(head, hidden), ids, temperature, top_k, entropy)


def _token_logprobs(
    made: _Head, ids: Tensor, temperature: float, top_k: int, entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    k = min(top_k, made.vocabulary)
    num_tokens = len(made.hidden)
    logprobs = ids.new_empty(ids.shape, dtype=torch.float32)
    topk_ids = ids.new_empty(num_tokens, k) if k else None
    topk_logprobs = ids.new_empty(num_tokens, k, dtype=torch.float32) if k else None
    entropies = ids.new_empty(num_tokens, dtype=torch.float32) if entropy else None
    for tokens in _slices(num_tokens, TOPK_TOKENS if k else TOKENS):
        log_sum, mean_logit, two_best = _log_sums(made, tokens, temperature, entropy=entropy, groups=k > 0)
        logprobs[tokens] = _chosen_logits(made, tokens, ids[tokens], temperature) - log_sum[:, None]
        if entropies is not None and mean_logit is not None:
            entropies[tokens] = log_sum - mean_logit
        if topk_ids is not None and topk_logprobs is not None and two_best is not None:
            found_ids, logits = _most_probable(made, tokens, two_best, k, temperature)
            topk_ids[tokens], topk_logprobs[tokens] = found_ids, logits - log_sum[:, None]
    return logprobs, topk_ids, topk_logprobs, entropies


def differentiable_token_logprobs(
    hidden: Tensor, head: OutputHead, ids: Tensor, *, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    """As :func:`jackpot.algorithm.vocabulary.differentiable_token_logprobs`, for ids [T, n]: log-probabilities and
    entropies, the latter empty unless requested."""
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
            log_sum[tokens], mean_logit, _ = _log_sums(made, tokens, temperature, entropy=entropy, groups=False)
            logprobs[tokens] = _chosen_logits(made, tokens, ids[tokens], temperature) - log_sum[tokens, None]
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

        tiles = _tiles(hidden.device.index, weight.dtype, writes=True)

        def in_products(tokens: slice, columns: slice, out: Tensor) -> None:
            kernels.logprob_gradient_kernel[(tiles.programs,)](
                *made.operands(tokens, columns, tiles),
                ids[tokens].contiguous(),
                gradient[tokens],
                gradient_sum[tokens],
                log_sum[tokens],
                out,
                columns.start,
                out.shape[1],
                out.shape[0],
                made.width,
                *made.shape,
                1.0 / temperature,
                ids.shape[1],
                *made.flags,
                tiles.programs,
                tiles.rows,
                tiles.columns,
                made.step,
                **tiles.launch,
            )

        gradients = _gradients(made, hidden, bias[0] if bias else None, ctx.needs_input_grad[:3], in_products)
        return (*gradients, *[None] * 4)


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

        tiles = _tiles(hidden.device.index, _wider(policy, actor), accumulators=2, writes=True)

        def in_products(tokens: slice, columns: slice, out: Tensor) -> None:
            kernels.forward_kl_gradient_kernel[(tiles.programs,)](
                *policy.operands(tokens, columns, tiles),
                *actor.operands(tokens, columns, tiles),
                gradient[tokens],
                policy_log_sum[tokens],
                actor_log_sum[tokens],
                out,
                out.shape[1],
                out.shape[0],
                policy.width,
                actor.width,
                *policy.shape,
                *actor.shape,
                1.0 / temperature,
                *policy.flags,
                *actor.flags,
                tiles.programs,
                tiles.rows,
                tiles.columns,
                policy.step,
                actor.step,
                **tiles.launch,
            )

        gradients = _gradients(actor, hidden, bias[0] if bias else None, ctx.needs_input_grad[:3], in_products)
        return (*gradients, *[None] * 4)


def _log_sums(
    made: _Head, tokens: slice, temperature: float, *, entropy: bool, groups: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log Σ exp z and Σ p z of a slice of c tokens, [c] each, and the two best of each group of neighbouring tokens,
    [2, c, groups]."""
    num_tokens = len(made.hidden[tokens])
    tiles = _tiles(made.hidden.device.index, made.weight.dtype)
    num_tiles = triton.cdiv(made.vocabulary, tiles.columns)
    greatest, total, weighted = made.hidden.new_empty(3, num_tiles, num_tokens, dtype=torch.float32)
    num_groups = num_tiles * tiles.columns // GROUP if groups else 0
    best, second = two_best = made.hidden.new_empty(2, num_tokens, num_groups, dtype=torch.float32)
    kernels.log_sum_kernel[(tiles.programs,)](
        *made.operands(tokens, slice(None), tiles),
        greatest,
        total,
        weighted,
        best,
        second,
        num_tokens,
        made.vocabulary,
        made.width,
        *made.shape,
        1.0 / temperature,
        *made.flags,
        entropy,
        groups,
        GROUP,
        tiles.programs,
        tiles.rows,
        tiles.columns,
        made.step,
        **tiles.launch,
    )
    log_sum, share = _combined(greatest, total)
    return log_sum, (weighted * share).sum(0) if entropy else None, two_best if groups else None


def _wider(policy: _Head, actor: _Head) -> torch.dtype:
    return torch.promote_types(policy.weight.dtype, actor.weight.dtype)


def _kl_sums(policy: _Head, actor: _Head, tokens: slice, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """KL(policy ‖ actor) of each token, and both models' log Σ exp z; [c] each."""
    num_tokens = len(actor.hidden[tokens])
    tiles = _tiles(actor.hidden.device.index, _wider(policy, actor), accumulators=2)
    num_tiles = triton.cdiv(actor.vocabulary, tiles.columns)
    sums = actor.hidden.new_empty(5, num_tiles, num_tokens, dtype=torch.float32)
    kernels.forward_kl_kernel[(tiles.programs,)](
        *policy.operands(tokens, slice(None), tiles),
        *actor.operands(tokens, slice(None), tiles),
        *sums,
        num_tokens,
        actor.vocabulary,
        policy.width,
        actor.width,
        *policy.shape,
        *actor.shape,
        1.0 / temperature,
        *policy.flags,
        *actor.flags,
        tiles.programs,
        tiles.rows,
        tiles.columns,
        policy.step,
        actor.step,
        **tiles.launch,
    )
    policy_log_sum, share = _combined(sums[0], sums[1])
    actor_log_sum, _ = _combined(sums[3], sums[4])
    # KL = E_p[z_p − z_ω] − log Σ e^z_p + log Σ e^z_ω
    return (sums[2] * share).sum(0) - policy_log_sum + actor_log_sum, policy_log_sum, actor_log_sum


def _combined(greatest: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """From tiles [n, c]: log Σ exp z, [c], and the weight of each tile's sum in the mean, [n, c]."""
    highest = greatest.amax(0)
    shrink = (greatest - highest).exp()
    whole = (total * shrink).sum(0)
    return highest + whole.log(), shrink / whole


def _chosen_logits(made: _Head, tokens: slice, ids: Tensor, temperature: float) -> Tensor:
    """Final logits of a slice of tokens at ids [c, n]; −inf beyond the vocabulary."""
    states = made.hidden[tokens]
    num_tokens, num_ids = ids.shape
    out = states.new_empty(ids.shape, dtype=torch.float32)
    block = min(32, triton.next_power_of_2(num_ids))
    kernels.chosen_logits_kernel[(num_tokens, triton.cdiv(num_ids, block))](
        states,
        made.weight,
        made.bias,
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


def _most_probable(made: _Head, tokens: slice, two_best: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The k most probable ids [c, k] and their logits, from the two best of each group.

    A token outside the k best groups has k tokens above it. Within these groups, tokens other than the best matter only
    if the group's second exceeds the best of the k-th group. All logits are computed only for these few groups.
    """
    best, groups = two_best[0].topk(min(k, two_best.shape[2]), dim=-1)
    # With fewer than k groups there is no k-th group, and all are searched.
    second = two_best[1].gather(1, groups) if groups.shape[1] == k else torch.full_like(best, float("inf"))
    logits = best.new_empty(*groups.shape, GROUP)
    kernels.candidates_kernel[groups.shape](
        made.hidden[tokens],
        made.weight,
        made.bias,
        groups,
        best,
        second,
        logits,
        groups.shape[1],
        made.vocabulary,
        made.width,
        *made.shape,
        1.0 / temperature,
        *made.flags,
        GROUP,
        min(256, triton.next_power_of_2(made.width)),
    )
    places = logits.flatten(1).topk(k, dim=-1).indices
    ids = groups.gather(1, places // GROUP) * GROUP + places % GROUP
    # The values that the programs compared lack their last bits.
    logits, order = _chosen_logits(made, tokens, ids, temperature).sort(dim=-1, descending=True)
    return ids.gather(1, order), logits


def _gradients(
    made: _Head,
    hidden: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, bool, bool],
    in_products: Callable[[slice, slice, Tensor], None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden states, weight and bias from blocks of the gradient of W h + b.

    ``in_products(tokens, columns, out)`` fills ``out``, [c, columns].
    """
    num_tokens = len(hidden)
    in_hidden = torch.zeros_like(made.hidden, dtype=torch.float32) if needs[0] else None
    # One slice holds all tokens, or several slices are summed in float32.
    wide = torch.float32 if num_tokens > TOKENS else made.weight.dtype
    in_weight = torch.zeros_like(made.weight, dtype=wide) if needs[1] else None
    in_bias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] and bias is not None else None
    for tokens in _slices(num_tokens, TOKENS):
        states = made.hidden[tokens]
        for columns in _slices(made.vocabulary, _columns(len(states))):
            out = made.weight.new_empty(len(states), columns.stop - columns.start)
            in_products(tokens, columns, out)
            if in_hidden is not None:
                _add_product(out, made.weight[columns], in_hidden[tokens])
            if in_weight is not None:
                _add_product(out.t(), states, in_weight[columns])
            if in_bias is not None:
                in_bias[columns] += out.sum(0, dtype=torch.float32)
            del out  # before the next one is allocated
    return (
        None if in_hidden is None else in_hidden.to(hidden.dtype),
        None if in_weight is None else in_weight.to(made.weight.dtype),
        None if in_bias is None or bias is None else in_bias.to(bias.dtype),
    )


def _add_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Add left · right, summed in float32, to ``out``."""
    if not left.is_cuda:  # in the interpreter, whose library cannot multiply mixed formats
        out += left.float() @ right.float()
    elif left.dtype == out.dtype:
        out.addmm_(left, right)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)


def _columns(num_tokens: int) -> int:
    """Columns per block: whole tiles."""
    return max(256, BLOCK_ELEMENTS // num_tokens // 256 * 256)


def _slices(num_tokens: int, size: int) -> Iterator[slice]:
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))
