"""Attention heads of any size on vLLM's CPU build, whose kernel knows only some sizes, from 32 up.

Zeros appended to queries, keys and values change no dot product and no output: softmax(q·k / √d) v is the same, since
the model passes the scale √d itself. This costs time and cache only for tiny models.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend


def pad_head_sizes() -> None:
    """Have vLLM's attention layers pad head sizes that its CPU kernel does not know. Idempotent."""
    if hasattr(Attention, "jackpot_head_size"):
        return
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    original_init, original_forward = Attention.__init__, Attention.forward

    @wraps(original_init)
    def init(self: Any, num_heads: int, head_size: int, *args: Any, **kwargs: Any) -> None:
        padded = min((size for size in sizes if size >= head_size), default=head_size)
        original_init(self, num_heads, padded, *args, **kwargs)
        self.jackpot_head_size = head_size

    @wraps(original_forward)
    def forward(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        size, padded = self.jackpot_head_size, self.head_size
        if size == padded:
            unpadded: Tensor = original_forward(self, query, key, value, *args, **kwargs)
            return unpadded
        output: Tensor = original_forward(self, *[_pad(heads, size, padded) for heads in (query, key, value)])
        return output.view(-1, padded)[:, :size].reshape(output.shape[0], -1)

    Attention.__init__, Attention.forward = init, forward
    Attention.jackpot_head_size = None


def _pad(heads: Tensor, size: int, padded: int) -> Tensor:
    """``[tokens, heads × size]`` → ``[tokens, heads × padded]``."""
    rows = heads.reshape(-1, size)
    return nn.functional.pad(rows, (0, padded - size)).view(heads.shape[0], -1)
