"""A batch on its way to the other ranks: its manifest, from which each reads its own part, or all of it. JSON and
safetensors, no pickle.

A rank other than 0 has arrays of the whole batch's size, of which only its own groups' part is filled: places of tokens
are the same on all ranks. What takes all tokens (κ and τ, denominators, λ) is rank 0's to say.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from jackpot.compute.ranks.partition import batch_shares, filler_row
from jackpot.scoring.batch import Batch, SequenceSlice, TokenArrays, cut_group, token_arrays
from jackpot.trajectory import ScoredGroup, VersionSpan

_HEAD = struct.Struct("<Q")  # size of the JSON part
# Of these every rank has all: they are in the manifest, by sequence.
_BY_SEQUENCE = ("sequence_index", "advantages")


def batch_to_bytes(batch: Batch) -> bytes:
    """The bytes that :func:`batch_from_bytes` reads."""
    tensors = {field.name: getattr(batch.tokens, field.name) for field in fields(TokenArrays)}
    tensors["input_ids"] = torch.from_numpy(np.concatenate([sequence.input_ids for sequence in batch.sequences]))
    return _pack(batch, tensors)


def batch_from_bytes(payload: bytes) -> Batch:
    """The batch of :func:`batch_to_bytes`, bit for bit."""
    named, tensors = _unpack(payload)
    values: dict[str, Any] = {field.name: tensors.get(field.name) for field in fields(TokenArrays)}
    inputs = np.split(tensors["input_ids"].numpy(), np.cumsum(tensors["slices"][:, 0].numpy())[:-1])
    return _batch(named, tensors, inputs, TokenArrays(**values))


@dataclass(frozen=True, slots=True, eq=False)
class StepManifest:
    """Everything about a batch but its tokens."""

    named: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def parse(cls, payload: bytes) -> StepManifest:
        """The manifest of :func:`manifest_to_bytes`."""
        return cls(*_unpack(payload))

    def groups_of_rank(self, updates: int, rank: int, size: int) -> list[str]:
        """The groups that a rank passes through the models, or a part of which it does; at least one.

        Args:
            updates: optimizer steps that the batch is split into.
            rank: whose.
            size: how many ranks.
        """
        starts = self.named["group_starts"]
        lengths = self.tensors["slices"][:, 0].tolist()
        bounds = [*starts, len(lengths)]
        per_part = len(starts) // updates
        group_ids: list[str] = []
        for first in range(0, per_part * updates, per_part):
            offset, end = bounds[first], bounds[first + per_part]
            part_starts = [start - offset for start in starts[first : first + per_part]]
            share = batch_shares(lengths[offset:end], part_starts, size)[rank]
            rows = {*share, filler_row(lengths[offset:end], share)}
            for index, start in enumerate(part_starts):
                stop = bounds[first + index + 1] - offset
                if rows & set(range(start, stop)):
                    group_ids.append(self.named["group_ids"][first + index])
        return group_ids

    def fill(self, groups: Mapping[str, ScoredGroup], max_sequence_tokens: int | None) -> Batch:
        """The batch with the tokens of these groups; those of others are 0.

        Args:
            groups: as read from the bus, by id.
            max_sequence_tokens: as in :func:`jackpot.scoring.batch.build_batch`.
        """
        slices = self.tensors["slices"]
        starts, ends = slices[:, 2], slices[:, 3]
        inputs = [np.zeros(length, dtype=np.int64) for length in slices[:, 0].tolist()]
        bounds = [*self.named["group_starts"], len(slices)]
        arrays: dict[str, Tensor | None] | None = None
        for index, group_id in enumerate(self.named["group_ids"]):
            if group_id not in groups:
                continue
            scored = groups[group_id]
            if max_sequence_tokens is not None:
                scored = cut_group(scored, max_sequence_tokens)
            rows = range(bounds[index], bounds[index + 1])
            for row, trajectory in zip(rows, scored.group.trajectories, strict=True):
                inputs[row] = np.concatenate([scored.group.prompt_token_ids, trajectory.token_ids]).astype(np.int64)
            group_arrays = token_arrays([scored], np.zeros(scored.group.num_tokens))
            arrays = arrays or _empty(group_arrays, int(ends[-1]))
            for name, array in arrays.items():
                if array is not None:
                    array[int(starts[rows[0]]) : int(ends[rows[-1]])] = getattr(group_arrays, name)
        counts = ends - starts
        by_sequence = {
            "sequence_index": torch.arange(len(slices)).repeat_interleave(counts),
            "advantages": self.tensors["sequence_advantages"].repeat_interleave(counts),
        }
        assert arrays is not None, "a rank always has a group of its own, see groups_of_rank"
        values: dict[str, Any] = arrays | by_sequence
        return _batch(self.named, self.tensors, inputs, TokenArrays(**values))


def manifest_to_bytes(batch: Batch) -> bytes:
    """The bytes that :meth:`StepManifest.parse` reads."""
    first = torch.tensor([sequence.start for sequence in batch.sequences])
    return _pack(batch, {"sequence_advantages": batch.tokens.advantages[first]})


def _pack(batch: Batch, tensors: Mapping[str, Tensor | None]) -> bytes:
    named = {
        "names": [sequence.trajectory_id for sequence in batch.sequences],
        "group_ids": list(batch.group_ids),
        "group_starts": list(batch.group_starts),
        "temperature": batch.temperature,
        "num_cut_tokens": batch.num_cut_tokens,
        "version_spans": [[[s.version, s.start, s.end] for s in spans] for spans in batch.version_spans],
    }
    arrays: dict[str, Any] = {
        "slices": np.array([[len(s.input_ids), s.prompt_length, s.start, s.end] for s in batch.sequences]),
        "rewards": batch.rewards,
        "truncated": batch.truncated,
        "oldest_versions": batch.oldest_versions,
        "reference_versions": batch.reference_versions,
        "exact_kl": batch.exact_kl,
    }
    group_tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}
    content = save({name: t.contiguous() for name, t in {**tensors, **group_tensors}.items() if t is not None})
    head = json.dumps(named).encode()
    return _HEAD.pack(len(head)) + head + content


def _unpack(payload: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    (size,) = _HEAD.unpack_from(payload)
    named = json.loads(payload[_HEAD.size : _HEAD.size + size])
    return named, load(payload[_HEAD.size + size :])


def _batch(
    named: Mapping[str, Any], tensors: Mapping[str, Tensor], inputs: Sequence[Any], tokens: TokenArrays
) -> Batch:
    slices = tensors["slices"].numpy()
    return Batch(
        sequences=tuple(
            SequenceSlice(name, ids, int(prompt_length), int(start), int(end))
            for name, ids, (_, prompt_length, start, end) in zip(named["names"], inputs, slices, strict=True)
        ),
        tokens=tokens,
        group_ids=tuple(named["group_ids"]),
        group_starts=tuple(named["group_starts"]),
        rewards=tensors["rewards"].numpy(),
        truncated=tensors["truncated"].numpy(),
        oldest_versions=tensors["oldest_versions"].numpy(),
        reference_versions=tensors["reference_versions"].numpy(),
        temperature=named["temperature"],
        exact_kl=tensors["exact_kl"].numpy() if "exact_kl" in tensors else None,
        version_spans=tuple(tuple(VersionSpan(*span) for span in spans) for spans in named["version_spans"]),
        num_cut_tokens=named["num_cut_tokens"],
    )


def _empty(like: TokenArrays, num_tokens: int) -> dict[str, Tensor | None]:
    """Arrays of zeros: pages of memory that nobody writes to are never taken."""
    arrays = {field.name: getattr(like, field.name) for field in fields(TokenArrays) if field.name not in _BY_SEQUENCE}
    return {
        name: None if array is None else torch.zeros(num_tokens, *array.shape[1:], dtype=array.dtype)
        for name, array in arrays.items()
    }
