"""A batch as bytes, for the other ranks: JSON and safetensors, no pickle.

Every rank holds the figures of all of the batch's tokens, about 60 bytes each, and so finds κ, τ, advantages and
denominators by the very arithmetic of a single process. Only the passes through the models are divided.
"""

from __future__ import annotations

import json
import struct
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from jackpot.learner.batch import Batch, SequenceSlice, TokenArrays

_HEAD = struct.Struct("<Q")  # size of the JSON part


def batch_to_bytes(batch: Batch) -> bytes:
    """The bytes that :func:`batch_from_bytes` reads."""
    named = {
        "names": [sequence.trajectory_id for sequence in batch.sequences],
        "group_starts": list(batch.group_starts),
        "temperature": batch.temperature,
        "num_cut_tokens": batch.num_cut_tokens,
    }
    tensors = {field.name: getattr(batch.tokens, field.name) for field in fields(TokenArrays)}
    arrays: dict[str, Any] = {
        "input_ids": np.concatenate([sequence.input_ids for sequence in batch.sequences]),
        "slices": np.array([[len(s.input_ids), s.prompt_length, s.start, s.end] for s in batch.sequences]),
        "rewards": batch.rewards,
        "truncated": batch.truncated,
        "oldest_versions": batch.oldest_versions,
        "exact_kl": batch.exact_kl,
    }
    tensors |= {name: None if array is None else torch.from_numpy(array) for name, array in arrays.items()}
    content = save({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None})
    head = json.dumps(named).encode()
    return _HEAD.pack(len(head)) + head + content


def batch_from_bytes(payload: bytes) -> Batch:
    """The batch of :func:`batch_to_bytes`, bit for bit."""
    (size,) = _HEAD.unpack_from(payload)
    named = json.loads(payload[_HEAD.size : _HEAD.size + size])
    tensors: dict[str, Tensor] = load(payload[_HEAD.size + size :])
    values: dict[str, Any] = {field.name: tensors.get(field.name) for field in fields(TokenArrays)}
    slices = tensors["slices"].numpy()
    inputs = np.split(tensors["input_ids"].numpy(), np.cumsum(slices[:, 0])[:-1])
    return Batch(
        sequences=tuple(
            SequenceSlice(name, ids, int(prompt_length), int(start), int(end))
            for name, ids, (_, prompt_length, start, end) in zip(named["names"], inputs, slices, strict=True)
        ),
        tokens=TokenArrays(**values),
        group_starts=tuple(named["group_starts"]),
        rewards=tensors["rewards"].numpy(),
        truncated=tensors["truncated"].numpy(),
        oldest_versions=tensors["oldest_versions"].numpy(),
        temperature=named["temperature"],
        exact_kl=tensors["exact_kl"].numpy() if "exact_kl" in tensors else None,
        num_cut_tokens=named["num_cut_tokens"],
    )
