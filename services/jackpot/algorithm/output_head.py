"""A model's output layer, applied to one slice of tokens at a time: only one slice has whole rows of logits."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

DEFAULT_CHUNK_TOKENS = 128
"""Tokens per slice. With a vocabulary of 150,000 a slice is 78 MB, and its matrix product runs at full speed."""

VocabularyKernel = Literal["auto", "torch", "triton"]
"""The implementation of a vocabulary pass; :func:`uses_triton` resolves ``auto``."""

_SMALL_SLICE = 1 << 22
"""Elements that a slice may always have (16 MB of float32), so that a small vocabulary does not cause many slices."""


@dataclass(frozen=True, slots=True, eq=False)
class OutputHead:
    """From a hidden state h ``[H]`` to logits ``[V]``: softcap · tanh(scale · (W h + b) / softcap).

    The tensors belong to the model and are not copies: gradients flow into them, and weight swaps take effect.
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    softcap: float | None = None  # None: no tanh
    scale: float = 1.0  # 1.0 in most architectures

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., H]``, all at once, in the weight's number format."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def token_slices(num_tokens: int, vocabulary: int, chunk_tokens: int) -> Iterator[slice]:
    """Consecutive slices of [0, num_tokens), of ``chunk_tokens`` each, or more if the vocabulary is small.

    Raises:
        ValueError: ``chunk_tokens`` is not positive.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens = {chunk_tokens} must be positive")
    size = max(chunk_tokens, _SMALL_SLICE // vocabulary)
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def uses_triton(kernel: VocabularyKernel, *tensors: OutputHead | Tensor) -> bool:
    """Whether the fused GPU programs run a pass over these heads and hidden states.

    ``auto`` uses them if Triton is installed and everything is in half precision, with rows of a multiple of 16 bytes,
    on a Hopper or newer GPU. Older GPUs cannot fetch tiles in hardware, and tensor cores cannot multiply float32
    exactly: there, slices through the library's matrix product are as fast.
    """
    if kernel != "auto":
        return kernel == "triton"
    plain = [part.weight if isinstance(part, OutputHead) else part for part in tensors]
    return _triton_installed() and all(
        tensor.is_cuda
        and tensor.dtype in (torch.bfloat16, torch.float16)
        and tensor.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(tensor.device) >= (9, 0)
        for tensor in plain
    )


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def widened(head: OutputHead, hidden: Tensor) -> tuple[OutputHead, Tensor]:
    """Head and hidden states in a form whose products are at least float32, made once for many slices.

    float32 and float64 are kept. On CUDA half-precision pairs are kept too, because :func:`matmul` accumulates and
    returns float32. Elsewhere both are converted, which copies a half-precision weight.
    """
    weight = head.weight.detach()
    hidden = hidden.detach()
    if hidden.is_cuda and hidden.dtype == weight.dtype and weight.dtype in (torch.bfloat16, torch.float16):
        return replace(head, weight=weight), hidden
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    return replace(head, weight=weight.to(wide)), hidden.to(wide)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left · right accumulated and returned in float32 (float64 for float64). [m, k] and [k, n] → [m, n]."""
    if right.dtype in (torch.float32, torch.float64):
        return left @ right
    return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)


def slice_logits(head: OutputHead, hidden: Tensor, temperature: float) -> Tensor:
    """Logits over the temperature, [c, V], of a slice of widened hidden states [c, H]. The caller owns the result."""
    logits = matmul(hidden, head.weight.t())
    if head.bias is not None:
        logits += head.bias.detach()
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    if temperature != 1.0:
        logits /= temperature
    return logits


def exact_logits(head: OutputHead, hidden: Tensor) -> Tensor:
    """Logits [T, V] of hidden states [T, H], accumulated and returned in float32, without gradient: the numbers that
    scoring and training compute, where :meth:`OutputHead.logits` rounds each logit to the weight's number format."""
    return slice_logits(*widened(head, hidden), 1.0)


def log_normalize_(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension, in place."""
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


class HeadGradients:
    """Gradients of hidden states and head, accumulated slice by slice.

    Args:
        head: the head as widened.
        hidden: [T, H], as widened.
        needs: whether hidden, weight and bias need a gradient.
    """

    def __init__(self, head: OutputHead, hidden: Tensor, needs: tuple[bool, bool, bool]) -> None:
        self._head = head
        self._hidden = hidden
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.hidden = torch.empty_like(hidden, dtype=wide) if needs[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=wide) if needs[1] else None
        self.bias = torch.zeros_like(head.bias, dtype=wide) if needs[2] and head.bias is not None else None

    def add(self, tokens: slice, logits_gradient: Tensor, softcap_slope: Tensor | None, temperature: float) -> None:
        """Add a slice.

        Args:
            tokens: the slice.
            logits_gradient: gradient of the slice's final logits, [c, V]; overwritten.
            softcap_slope: the result of :func:`softcap_slope`.
            temperature: the temperature of the logits.
        """
        factor = self._head.scale / temperature
        if factor != 1.0:
            logits_gradient *= factor
        if softcap_slope is not None:
            logits_gradient *= softcap_slope
        if self.bias is not None:
            self.bias += logits_gradient.sum(0)
        if self.hidden is not None:
            self.hidden[tokens] = matmul(logits_gradient, self._head.weight)
        if self.weight is None:
            return
        if self.weight.dtype == self._hidden.dtype:
            self.weight.addmm_(logits_gradient.t(), self._hidden[tokens])
        else:
            self.weight += matmul(logits_gradient.t(), self._hidden[tokens])

    def like(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """The three gradients in the number formats of their tensors; None for those not needed."""
        pairs = ((self.hidden, hidden), (self.weight, weight), (self.bias, bias))
        return tuple(None if g is None or x is None else g.to(x.dtype) for g, x in pairs)


def softcap_slope(head: OutputHead, logits: Tensor, temperature: float) -> Tensor | None:
    """d cap(x)/dx = 1 − tanh² from the final logits [c, V]; None without a cap."""
    if head.softcap is None:
        return None
    return (logits * (temperature / head.softcap)).square_().neg_().add_(1.0)
