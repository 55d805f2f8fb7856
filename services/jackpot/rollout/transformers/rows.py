"""The trajectories being decoded, as tensors with one row each, and what has been sampled for them so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jackpot.rollout.engine import GroupRequest
from jackpot.rollout.transformers.sampling import DrawnTokens, trajectory_uniforms

# Initial columns of the buffers for sampled tokens; doubled as trajectories grow.
FIRST_COLUMNS = 64
_NO_TOKEN = -1


@dataclass(slots=True, eq=False)
class Row:
    """A row's trajectory, and the weight versions that have sampled it."""

    request: GroupRequest
    index: int
    versions: list[tuple[int, int]]  # (version, its first token), oldest first
    joined: int = 0  # steps of its batch before it joined


@dataclass(slots=True, eq=False)
class RowTensors:
    """State of B rows. Every field has the batch axis first, so rows are selected and joined field by field."""

    next_inputs: Tensor  # int64 [B], the last token, which the model has not seen yet
    positions: Tensor  # int64 [B], its position
    counts: Tensor  # int64 [B], tokens sampled
    max_tokens: Tensor  # int64 [B]
    temperatures: Tensor  # float32 [B]
    stop_ids: Tensor  # int64 [B, S], padded with −1
    uniforms: Tensor  # float32 [B, longest max_tokens]
    token_ids: Tensor  # int64 [B, W], valid up to counts
    logprobs: Tensor  # float32 [B, W]
    topk_ids: Tensor  # int32 [B, W, k], k the largest of all rows
    topk_logprobs: Tensor  # float16 [B, W, k]

    @classmethod
    def start(cls, rows: Sequence[Row], eos_ids: Sequence[int], device: torch.device) -> RowTensors:
        """The state of rows that have sampled no token yet."""
        requests = [row.request for row in rows]
        limits = [request.sampling.max_tokens for request in requests]
        stops = [sorted({*eos_ids, *request.sampling.stop_token_ids}) for request in requests]
        uniforms = np.zeros((len(rows), max(limits)), dtype=np.float32)
        for row, limit, line in zip(rows, limits, uniforms, strict=True):
            line[:limit] = trajectory_uniforms(row.request.sampling.seed, row.index, limit)
        columns = min(FIRST_COLUMNS, max(limits))
        num_stops = max(len(ids) for ids in stops)
        top_k = max(request.sampling.top_logprobs for request in requests)

        def ints(values: Sequence[Any]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            next_inputs=ints([int(request.prompt_token_ids[-1]) for request in requests]),
            positions=ints([len(request.prompt_token_ids) - 1 for request in requests]),
            counts=ints([0] * len(rows)),
            max_tokens=ints(limits),
            temperatures=torch.tensor([request.sampling.temperature for request in requests], device=device),
            stop_ids=ints([ids + [_NO_TOKEN] * (num_stops - len(ids)) for ids in stops]),
            uniforms=torch.from_numpy(uniforms).to(device),
            token_ids=torch.zeros((len(rows), columns), dtype=torch.int64, device=device),
            logprobs=torch.zeros((len(rows), columns), device=device),
            topk_ids=torch.zeros((len(rows), columns, top_k), dtype=torch.int32, device=device),
            topk_logprobs=torch.zeros((len(rows), columns, top_k), dtype=torch.float16, device=device),
        )

    @property
    def columns(self) -> int:
        """Tokens that the buffers hold per row."""
        return self.token_ids.shape[1]

    @property
    def top_k(self) -> int:
        """Candidates kept per position."""
        return self.topk_ids.shape[2]

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])

    def join(self, other: RowTensors) -> None:
        """Append the rows of another state."""
        for field in fields(self):
            mine, their = getattr(self, field.name), getattr(other, field.name)
            fill = _NO_TOKEN if field.name == "stop_ids" else 0
            setattr(self, field.name, torch.cat([_widen(mine, their, fill), _widen(their, mine, fill)]))

    def grow(self) -> None:
        """Double the buffers for sampled tokens."""
        for name in ("token_ids", "logprobs", "topk_ids", "topk_logprobs"):
            buffer = getattr(self, name)
            setattr(self, name, torch.cat([buffer, torch.zeros_like(buffer)], dim=1))

    def record(self, drawn: DrawnTokens) -> Tensor:
        """Append one token per row; bool ``[B]``: which rows it finishes."""
        at = (torch.arange(len(self.counts), device=self.counts.device), self.counts)
        self.token_ids[at] = drawn.tokens
        self.logprobs[at] = drawn.logprobs
        if self.top_k:
            self.topk_ids[at] = drawn.topk_ids.to(torch.int32)
            self.topk_logprobs[at] = drawn.topk_logprobs.to(torch.float16)
        self.next_inputs = drawn.tokens
        self.positions += 1
        self.counts += 1
        return (self.stop_ids == drawn.tokens[:, None]).any(dim=1) | (self.counts >= self.max_tokens)


def _widen(tensor: Tensor, like: Tensor, fill: int) -> Tensor:
    """Pad all axes but the first, at their ends, to at least the size that ``like`` has."""
    missing = [max(0, there - here) for here, there in zip(tensor.shape[1:], like.shape[1:], strict=True)]
    if not any(missing):
        return tensor
    return nn.functional.pad(tensor, [amount for size in reversed(missing) for amount in (0, size)], value=fill)
