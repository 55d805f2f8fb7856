"""Keys and values of rows that come and go. Rows are aligned at their ends: what is missing in front is padding.

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
    pads: NDArray[np.int64]  # [B]; here and not on the device, which a question would hold up
    length: int  # L ≥ 1
    _pads_there: Tensor | None = field(default=None, init=False)  # on the device, once a mask was asked for

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order (a row may repeat), and drop columns that are padding in all of them."""
        self.past.batch_select_indices(upload(np.asarray(rows, dtype=np.int64), self._device))
        self._set_pads(self.pads[rows])
        if self.pads.any():
            # One column always stays, so that layers are never empty.
            self._drop_front(min(int(self.pads.min()), self.length - 1))

    def join(self, other: RowCache) -> None:
        """Append the rows of another cache. The shorter of the two is padded in front."""
        length = max(self.length, other.length)
        ours, theirs = length - self.length, length - other.length
        for mine, their in zip(_layers(self.past), _layers(other.past), strict=True):
            mine.keys = torch.cat([_pad_front(mine.keys, ours), _pad_front(their.keys, theirs)])
            mine.values = torch.cat([_pad_front(mine.values, ours), _pad_front(their.values, theirs)])
        self._set_pads(np.concatenate([self.pads + ours, other.pads + theirs]))
        self.length = length

    def step_mask(self) -> Tensor | None:
        """What each row's next token attends to, itself included: bool ``[B, L + 1]``; None if nothing is hidden."""
        if not self.pads.any():
            return None
        if self._pads_there is None:
            self._pads_there = upload(self.pads, self._device)
        return torch.arange(self.length + 1, device=self._device) >= self._pads_there[:, None]

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
    # Padding behind needs no mask: attention is causal. It is moved to the front afterwards.
    past = DynamicCache()
    cached_pass(model, past, input_ids=upload(ids, model.device))
    pads = length - lengths
    if pads.any():
        shifts = upload(pads, model.device)
        for layer in _layers(past):
            layer.keys, layer.values = _to_the_end(layer.keys, shifts), _to_the_end(layer.values, shifts)
    return RowCache(past, pads, length)


def cached_pass(model: PreTrainedModel, past: DynamicCache, **inputs: Tensor | None) -> Tensor:
    """Last hidden states ``[B, L, H]`` of the inputs behind what is cached, to which theirs is added."""
    base = model.base_model
    name = _cache_argument(type(base).forward)
    states: Tensor = base(**inputs, **{name: past}, use_cache=True).last_hidden_state
    return states


@cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    """What an architecture calls its cache: transformers renames it from 5.24 on, one architecture after another."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array on the device. What the device has still to do is not waited for."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def _to_the_end(states: Tensor, pads: Tensor) -> Tensor:
    """Rotate row b of ``[B, heads, L, size]`` by ``pads[b]`` columns, so that its padding comes first."""
    columns = (torch.arange(states.shape[2], device=states.device) - pads[:, None]) % states.shape[2]
    return states.gather(2, columns[:, None, :, None].expand_as(states))


def _pad_front(states: Tensor, columns: int) -> Tensor:
    return nn.functional.pad(states, (0, 0, columns, 0)) if columns else states


def _layers(past: DynamicCache) -> Sequence[Any]:
    return past.layers
