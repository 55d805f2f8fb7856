"""Attention within sequences that are packed into one row, without a mask: torch's ``varlen_attn`` as an attention
implementation of transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

VARLEN = "jackpot_varlen"
"""Its name among transformers' attention implementations."""

_LARGEST_HEAD = 256
_HEAD_MULTIPLE = 8
_LEAST_CAPABILITY = (8, 0)  # required by the kernels: Ampere
# Arguments that transformers passes to every attention function and that need no action.
_OF_NO_EFFECT = frozenset({"position_ids", "cache_position", "cu_seq_lens_k", "max_length_k"})


def _kernel() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    # Its first version has no scale argument.
    return varlen_attn if "scale" in inspect.signature(varlen_attn).parameters else None


_VARLEN_ATTN = _kernel()
_TAKES_GROUPED_HEADS = _VARLEN_ATTN is not None and "enable_gqa" in inspect.signature(_VARLEN_ATTN).parameters


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has the kernel for this device and dtype."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and _VARLEN_ATTN is not None
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
    )


HasKernel = Callable[[torch.device, torch.dtype], bool]
"""The type of :func:`is_available`."""


def switch(model: PreTrainedModel) -> None:
    """Have a model attend by lengths; in place. If that is not possible, transformers leaves the model unchanged."""
    AttentionInterface.register(VARLEN, attend)
    AttentionMaskInterface.register(VARLEN, no_mask)
    model.set_attn_implementation(VARLEN)


@contextmanager
def switched(model: PreTrainedModel) -> Iterator[None]:
    """The same within a ``with`` block."""
    before = model.config._attn_implementation
    switch(model)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attends_by_lengths(model: PreTrainedModel) -> bool:
    """Whether the model is switched."""
    return bool(model.config._attn_implementation == VARLEN)


def bounds(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Arguments of a switched model's forward for one row of sequences of these lengths.

    Made once a pass, they reach every layer under transformers' own names for such bounds.
    """
    cumulative = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within sequences, with the signature that transformers expects.

    Args:
        module: the layer.
        query: ``[B, H, L, D]``.
        key: ``[B, H_kv, L, D]``.
        value: as ``key``.
        attention_mask: a caller's own, bool ``[B, 1, L, L]``, for which SDPA is used; not together with lengths.
        scaling: the factor on scores; None is 1/√D.
        cu_seq_lens_q: starts of the sequences in the only row, and the end of the last, ``[N + 1]`` int32; if None,
            every row is one sequence.
        max_length_q: tokens of the longest.
        others: the architecture's further arguments.

    Returns:
        ``[B, L, H, D]``.

    Raises:
        ValueError: the architecture needs an unsupported feature.
    """
    _refuse_what_is_not_done(module, query, key, value, others)
    if attention_mask is not None:
        if cu_seq_lens_q is not None:
            raise ValueError("its layers get a mask beside the lengths of sequences")
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
        return output, None
    rows, heads, length, head_dim = query.shape
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=query.device)
        max_length_q = length
    # [B · L, H, D]. Rotary embeddings in float32 leave wider queries and keys than the kernel supports.
    q, k, v = (
        tensor.to(value.dtype).transpose(1, 2).reshape(rows * length, -1, head_dim).contiguous()
        for tensor in (query, key, value)
    )
    attend_flat = _attend_on_gpu if query.is_cuda else attend_one_by_one
    output = attend_flat(q, k, v, cu_seq_lens_q, max_length_q, scaling)
    return output.view(rows, length, heads, head_dim), None


def attend_one_by_one(
    query: Tensor, key: Tensor, value: Tensor, cumulative: Tensor, _longest: int, scale: float | None
) -> Tensor:
    """The same without the kernel, ``[T, H, D]``: a loop over the sequences. For the CPU, where models are tested."""
    parts = []
    for start, end in pairwise(cumulative.tolist()):
        q, k, v = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        parts.append(attended[0].transpose(0, 1))
    return torch.cat(parts)


def _attend_on_gpu(
    query: Tensor, key: Tensor, value: Tensor, cumulative: Tensor, longest: int, scale: float | None
) -> Tensor:
    assert _VARLEN_ATTN is not None
    grouped: dict[str, bool] = {}
    if _TAKES_GROUPED_HEADS:
        grouped["enable_gqa"] = True
    elif query.shape[1] != key.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    output: Tensor = _VARLEN_ATTN(
        query, key, value, cumulative, cumulative, longest, longest, scale=scale, window_size=_CAUSAL, **grouped
    )
    return output


_CAUSAL = (-1, 0)  # everything before, nothing after


def no_mask(*, attention_mask: Tensor | None = None, **_: Any) -> None:
    """Replaces transformers' masks. Right padding needs none: real tokens never see it.

    Args:
        attention_mask: ``[B, L]``, True at real tokens.

    Raises:
        ValueError: it hides tokens that later ones would see.
    """
    if attention_mask is not None and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise ValueError("attention by lengths sees a row from its first token on. Pad rows on the right")


def _refuse_what_is_not_done(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, others: dict[str, Any]
) -> None:
    head_dim = query.shape[-1]
    if not getattr(module, "is_causal", True):
        raise ValueError("its attention is not causal")
    if not query.shape[2] == key.shape[2] == value.shape[2]:
        raise ValueError("attention by lengths has no cache")
    if not head_dim == key.shape[-1] == value.shape[-1] or head_dim > _LARGEST_HEAD or head_dim % _HEAD_MULTIPLE:
        raise ValueError(
            f"its heads have {head_dim} dimensions for queries and {value.shape[-1]} for values; attention by lengths "
            f"wants one number for both, a multiple of {_HEAD_MULTIPLE} up to {_LARGEST_HEAD}"
        )
    # A window, a cap on scores, sinks: features of newer architectures are refused until they are supported here.
    wanted = [name for name, given in others.items() if name not in _OF_NO_EFFECT and _asks(given)]
    if wanted:
        raise ValueError(f"its attention wants {', '.join(wanted)}, which attention by lengths does not know")


def _asks(given: object) -> bool:
    return given is not None and given is not False and not (isinstance(given, float) and given == 0.0)
