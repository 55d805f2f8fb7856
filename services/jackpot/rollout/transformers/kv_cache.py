"""Keys and values of rows that join and leave. Rows are aligned at their ends, with padding in front.

Every layer keeps all positions, sliding-window layers too (their mask hides what is outside the window), so rows of
any age fit together by padding alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel


@dataclass(slots=True, eq=False)
class RowCache:
    """Keys and values ``[B, heads, L, head size]`` of every layer; row b's first ``pads[b]`` columns are padding."""

    past: DynamicCache
    pads: NDArray[np.int64]  # [B]; on the host, since reading it from the device would synchronize
    length: int  # L ≥ 1
    _pads_there: Tensor | None = field(default=None, init=False)  # on the device, once a mask was needed

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order (a row may repeat), and drop columns that are padding in all of them."""
        self.past.batch_select_indices(upload(np.asarray(rows, dtype=np.int64), self._device))
        self._set_pads(self.pads[rows])
        self._drop_common_padding()

    def taken(self, rows: Sequence[int]) -> RowCache:
        """A new cache of only these rows, in this order (a row may repeat); this one is unchanged."""
        index = upload(np.asarray(rows, dtype=np.int64), self._device)
        past = DynamicCache()
        for number, layer in enumerate(_layers(self.past)):
            past.update(layer.keys[index], layer.values[index], number)
        part = RowCache(past, self.pads[rows], self.length)
        part._drop_common_padding()
        return part

    def join(self, other: RowCache) -> None:
        """Append the rows of another cache. The shorter of the two is padded in front."""
        length = max(self.length, other.length)
        ours, theirs = length - self.length, length - other.length
        for mine, their in zip(_layers(self.past), _layers(other.past), strict=True):
            mine.keys = torch.cat([_pad_front(mine.keys, ours), _pad_front(their.keys, theirs)])
            mine.values = torch.cat([_pad_front(mine.values, ours), _pad_front(their.values, theirs)])
        self._set_pads(np.concatenate([self.pads + ours, other.pads + theirs]))
        self.length = length

    def extend(self, model: PreTrainedModel, continuations: Sequence[NDArray[Any]], pass_tokens: int) -> None:
        """Append each row's next tokens (a row may have none) in passes of at most ``pass_tokens`` tokens."""
        counts = np.array([len(tokens) for tokens in continuations])
        width = int(counts.max())
        ids = np.zeros((len(counts), width), dtype=np.int64)
        for row, tokens in zip(ids, continuations, strict=True):
            row[: len(tokens)] = tokens
        first = self.length - self.pads
        # Padding after a row's last token repeats that token's position: a later one may not exist.
        positions = np.minimum(first[:, None] + np.arange(width), (first + np.maximum(counts, 1) - 1)[:, None])
        columns = max(1, pass_tokens // len(counts))
        for begin in range(0, width, columns):
            inputs = [upload(array[:, begin : begin + columns], self._device) for array in (ids, positions)]
            mask = self.mask(inputs[0].shape[1])
            cached_pass(model, self.past, input_ids=inputs[0], position_ids=inputs[1], attention_mask=mask)
            self.length += inputs[0].shape[1]
        self._move_to_the_end(width - counts)
        self._set_pads(self.pads + width - counts)

    def mask(self, columns: int) -> Tensor | None:
        """Mask of the cache and ``columns`` tokens after it: bool ``[B, L + columns]``; None if all are visible."""
        if not self.pads.any():
            return None
        if self._pads_there is None:
            self._pads_there = upload(self.pads, self._device)
        return torch.arange(self.length + columns, device=self._device) >= self._pads_there[:, None]

    def _move_to_the_end(self, behind: NDArray[np.int64]) -> None:
        """Move the last ``behind[b]`` columns of row b, which are padding, to its front."""
        if behind.any():
            shifts = upload(behind, self._device)
            for layer in _layers(self.past):
                layer.keys, layer.values = _rotated(layer.keys, shifts), _rotated(layer.values, shifts)

    def _drop_common_padding(self) -> None:
        if self.pads.any():
            # One column always stays, so that layers are never empty.
            self._drop_front(min(int(self.pads.min()), self.length - 1))

    def _drop_front(self, columns: int) -> None:
        for layer in _layers(self.past):
            layer.keys, layer.values = layer.keys[:, :, columns:], layer.values[:, :, columns:]
        self.length -= columns
        self._set_pads(self.pads - columns)

    def _set_pads(self, pads: NDArray[np.int64]) -> None:
        self.pads, self._pads_there = pads, None

    @property
    def _device(self) -> torch.device:
        device: torch.device = _layers(self.past)[0].keys.device
        return device


def prefill(model: PreTrainedModel, prefixes: Sequence[NDArray[Any]]) -> RowCache:
    """One pass over token sequences (empty ones are allowed): their keys and values, one row each."""
    lengths = np.array([len(prefix) for prefix in prefixes])
    length = max(1, int(lengths.max()))
    ids = np.zeros((len(prefixes), length), dtype=np.int64)
    for row, prefix in zip(ids, prefixes, strict=True):
        row[: len(prefix)] = prefix
    # Padding at the end needs no mask, since attention is causal. It is moved to the front afterwards.
    past = DynamicCache()
    cached_pass(model, past, input_ids=upload(ids, model.device))
    cache = RowCache(past, length - lengths, length)
    cache._move_to_the_end(cache.pads)
    return cache


def cached_pass(model: PreTrainedModel, past: DynamicCache, **inputs: Tensor | None) -> Tensor:
    """Last hidden states ``[B, L, H]`` of inputs that follow the cache; their keys and values are appended to it."""
    base = model.base_model
    name = _cache_argument(type(base).forward)
    states: Tensor = base(**inputs, **{name: past}, use_cache=True).last_hidden_state
    return states


@cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    """The name of an architecture's cache argument; from 5.24 on transformers renames it for one after another."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array on the device, copied without waiting for the device's pending work."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def _rotated(states: Tensor, shifts: Tensor) -> Tensor:
    """Row b of ``[B, heads, L, size]``, rotated to the right by ``shifts[b]`` columns."""
    columns = (torch.arange(states.shape[2], device=states.device) - shifts[:, None]) % states.shape[2]
    return states.gather(2, columns[:, None, :, None].expand_as(states))


def _pad_front(states: Tensor, columns: int) -> Tensor:
    return nn.functional.pad(states, (0, 0, columns, 0)) if columns else states


def _layers(past: DynamicCache) -> Sequence[Any]:
    return past.layers
