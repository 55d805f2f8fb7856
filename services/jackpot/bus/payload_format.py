"""Groups and scored groups as bytes: what the bus stores.

Layout: a fixed header (magic, schema version, kind, flags, size of the body before compression, CRC-32 of everything
else), then a msgpack body in which arrays are raw little-endian bytes, zstd-compressed where the flag says so.
A reader checks everything: a payload either decodes to valid trajectories or raises PayloadError.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import msgpack
import numpy as np
import zstandard
from numpy.typing import NDArray

from jackpot.errors import PayloadError
from jackpot.trajectory import (
    DEFERRED,
    Group,
    GroupKey,
    ScoredGroup,
    TokenScores,
    Trajectory,
    VersionSpan,
    unscored,
)

SCHEMA_VERSION = 1
DEFAULT_MAX_BYTES = 256 << 20

_MAGIC = b"JKPT"
_HEADER = struct.Struct("<4sBBBxQI")  # magic, schema version, kind, flags, padding, body size, checksum
_CHECKED = _HEADER.size - 4  # the header up to its checksum
_KIND_GROUP, _KIND_SCORED = 1, 2
_FLAG_ZSTD = 1
_ZSTD_LEVEL = 1
# msgpack allocates nested arrays before it reads their elements: without a limit, a few bytes could allocate gigabytes.
_MAX_TRAJECTORIES = 1 << 16
# Log-probabilities come from float32 softmaxes (float16 for top-k), which may round to just above zero.
_LOGPROB_EPSILON = 1e-3
_FINISH_REASONS = ("stop", "length")
_UINT32, _FLOAT32, _FLOAT16, _BOOL = (np.dtype(kind) for kind in ("u4", "f4", "f2", "?"))
_NATIVE = {kind: np.dtype(kind).newbyteorder("=") for kind in ("<u4", "<f4", "<f2", "<i8", "<u1")}
_SCORE_ARRAYS = ("target_logprobs", "acceptance_probs", "normalizer_head", "normalizer_tail", "topk_mass")


def encode_group(group: Group, *, compress: bool = False, max_bytes: int = DEFAULT_MAX_BYTES) -> bytes:
    """The bytes of a group. ``compress`` costs a few ms per MB and pays off over a network.

    Raises:
        PayloadError: the group breaks a rule of its format, or is larger than ``max_bytes``.
    """
    return _seal(_KIND_GROUP, _group_fields(group), compress, max_bytes)


def encode_scored(scored: ScoredGroup, *, compress: bool = False, max_bytes: int = DEFAULT_MAX_BYTES) -> bytes:
    """The bytes of a scored group.

    Raises:
        PayloadError: the group breaks a rule of its format, or is larger than ``max_bytes``.
    """
    _check_scored(scored)
    fields = {
        "group": _group_fields(scored.group),
        # Deferred scores carry no information beyond the group.
        "scores": None if scored.normalizer == DEFERRED else [_score_fields(scores) for scores in scored.scores],
        "obrs_lambda": float(scored.obrs_lambda),
        "policy_version": int(scored.policy_version),
        "normalizer": scored.normalizer,
    }
    return _seal(_KIND_SCORED, fields, compress, max_bytes)


def decode_group(data: bytes, *, max_bytes: int = DEFAULT_MAX_BYTES) -> Group:
    """The group in a payload. Its arrays are writable and belong to the caller.

    Raises:
        PayloadError: truncated, corrupt, oversized after decompression, of another schema, or breaking a rule.
    """
    return _read_group(_open(_KIND_GROUP, data, max_bytes))


def decode_scored(data: bytes, *, max_bytes: int = DEFAULT_MAX_BYTES) -> ScoredGroup:
    """The scored group in a payload. Its arrays are writable and belong to the caller.

    Raises:
        PayloadError: truncated, corrupt, oversized after decompression, of another schema, or breaking a rule.
    """
    fields = _open(_KIND_SCORED, data, max_bytes)
    group = _read_group(_get(fields, "group", dict))
    normalizer = _get(fields, "normalizer", str)
    scored = ScoredGroup(
        group=group,
        scores=_read_all_scores(fields, group, normalizer),
        obrs_lambda=_get(fields, "obrs_lambda", float),
        policy_version=_get(fields, "policy_version", int),
        normalizer=normalizer,
    )
    _check_scored(scored)
    return scored


# --- the envelope ---


def _seal(kind: int, fields: Mapping[str, Any], compress: bool, max_bytes: int) -> bytes:
    try:
        body: bytes = msgpack.packb(fields)
    except (ValueError, OverflowError) as error:
        raise PayloadError(f"cannot be written: {error}") from None
    if len(body) > max_bytes:
        raise PayloadError(f"{len(body)} bytes exceed the limit of {max_bytes}. Raise bus.max_payload_bytes.")
    stored = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(body) if compress else body
    flags = _FLAG_ZSTD if compress else 0
    head = _HEADER.pack(_MAGIC, SCHEMA_VERSION, kind, flags, len(body), 0)[:_CHECKED]
    return b"".join((head, struct.pack("<I", zlib.crc32(stored, zlib.crc32(head))), stored))


def _open(kind: int, data: bytes, max_bytes: int) -> dict[str, Any]:
    """Undo :func:`_seal`. The body's size is checked before anything is allocated for it."""
    if len(data) < _HEADER.size:
        raise PayloadError(f"truncated: {len(data)} bytes, the header alone has {_HEADER.size}")
    magic, version, found_kind, flags, size, checksum = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise PayloadError("not a Jackpot payload (wrong magic)")
    stored = memoryview(data)[_HEADER.size :]
    if zlib.crc32(stored, zlib.crc32(data[:_CHECKED])) != checksum:
        raise PayloadError("corrupt or truncated (checksum mismatch)")
    if version != SCHEMA_VERSION:
        raise PayloadError(f"schema version {version}, this process reads {SCHEMA_VERSION}. Run one Jackpot version.")
    if found_kind != kind or flags & ~_FLAG_ZSTD:
        raise PayloadError(f"kind {found_kind} with flags {flags:#x} where kind {kind} was expected")
    if size > max_bytes:
        raise PayloadError(f"oversized: {size} bytes, the limit is {max_bytes}. Raise bus.max_payload_bytes.")
    body = _decompressed(bytes(stored), size) if flags & _FLAG_ZSTD else stored
    if len(body) != size:
        raise PayloadError(f"the body has {len(body)} bytes, its header says {size}")
    return _unpack(body)


def _decompressed(stored: bytes, size: int) -> bytes:
    try:
        # zstd allocates by the content size in its frame, so that must equal the size just checked.
        if zstandard.get_frame_parameters(stored).content_size != size:
            raise PayloadError("the compressed frame's size differs from the header's")
        return zstandard.ZstdDecompressor().decompress(stored, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PayloadError(f"cannot be decompressed: {error}") from None


def _unpack(body: bytes | memoryview) -> dict[str, Any]:
    try:
        fields = msgpack.unpackb(body, max_array_len=_MAX_TRAJECTORIES, max_map_len=64, max_ext_len=0)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise PayloadError(f"not msgpack: {error}") from None
    if not isinstance(fields, dict):
        raise PayloadError(f"the body is a {type(fields).__name__}, not a map")
    return fields


# --- fields ---


def _group_fields(group: Group) -> dict[str, Any]:
    _check_group(group)
    try:
        metadata = json.dumps(dict(group.metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PayloadError(f"group {group.group_id}: metadata must be JSON values: {error}") from None
    return {
        "group_id": group.group_id,
        "prompt_index": int(group.prompt_index),
        "prompt": _raw(group.prompt_token_ids, "<u4"),
        "temperature": float(group.temperature),
        "dispatch_version": int(group.dispatch_version),
        "metadata": metadata,
        "trajectories": [_trajectory_fields(trajectory) for trajectory in group.trajectories],
    }


def _trajectory_fields(trajectory: Trajectory) -> dict[str, Any]:
    spans = np.array([(span.version, span.start, span.end) for span in trajectory.version_spans])
    has_topk = trajectory.topk_ids is not None and trajectory.topk_logprobs is not None
    return {
        "trajectory_id": trajectory.trajectory_id,
        "num_tokens": trajectory.num_tokens,
        "token_ids": _raw(trajectory.token_ids, "<u4"),
        "actor_logprobs": _raw(trajectory.actor_logprobs, "<f4"),
        "topk_ids": _raw(trajectory.topk_ids, "<u4") if has_topk else None,
        "topk_logprobs": _raw(trajectory.topk_logprobs, "<f2") if has_topk else None,
        "spans": _raw(spans, "<i8"),
        "finish_reason": trajectory.finish_reason,
        "reward": None if trajectory.reward is None else float(trajectory.reward),
    }


def _score_fields(scores: TokenScores) -> dict[str, Any]:
    arrays: dict[str, Any] = {name: _raw(getattr(scores, name), "<f4") for name in _SCORE_ARRAYS}
    return arrays | {"mask": _raw(scores.mask, "<u1")}


def _read_group(fields: Mapping[str, Any]) -> Group:
    group = Group(
        group_id=_get(fields, "group_id", str),
        prompt_index=_get(fields, "prompt_index", int),
        prompt_token_ids=_array(fields, "prompt", "<u4", (-1,)),
        trajectories=tuple(_read_trajectory(entry) for entry in _get(fields, "trajectories", list)),
        temperature=_get(fields, "temperature", float),
        dispatch_version=_get(fields, "dispatch_version", int),
        metadata=_read_metadata(_get(fields, "metadata", str)),
    )
    _check_group(group)
    return group


def _read_metadata(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        metadata = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"metadata is not JSON: {error}") from None
    if not isinstance(metadata, dict):
        raise PayloadError("metadata is not a JSON object")
    return metadata


def _read_trajectory(fields: Any) -> Trajectory:
    num_tokens = _get(fields, "num_tokens", int)
    if num_tokens < 1:
        raise PayloadError(f"a trajectory of {num_tokens} tokens")
    has_topk = fields.get("topk_ids") is not None
    reward = fields.get("reward")
    return Trajectory(
        trajectory_id=_get(fields, "trajectory_id", str),
        token_ids=_array(fields, "token_ids", "<u4", (num_tokens,)),
        actor_logprobs=_array(fields, "actor_logprobs", "<f4", (num_tokens,)),
        topk_ids=_array(fields, "topk_ids", "<u4", (num_tokens, -1)) if has_topk else None,
        topk_logprobs=_array(fields, "topk_logprobs", "<f2", (num_tokens, -1)) if has_topk else None,
        version_spans=tuple(VersionSpan(*span) for span in _array(fields, "spans", "<i8", (-1, 3)).tolist()),
        finish_reason=_get(fields, "finish_reason", str),
        reward=None if reward is None else _get(fields, "reward", float),
    )


def _read_all_scores(fields: Mapping[str, Any], group: Group, normalizer: str) -> tuple[TokenScores, ...]:
    if normalizer == DEFERRED:
        return tuple(unscored(trajectory) for trajectory in group.trajectories)
    scores = _get(fields, "scores", list)
    if len(scores) != len(group.trajectories):
        raise PayloadError(f"{len(scores)} scores for {len(group.trajectories)} trajectories")
    return tuple(_read_scores(s, t.num_tokens) for s, t in zip(scores, group.trajectories, strict=True))


def _read_scores(fields: Any, num_tokens: int) -> TokenScores:
    mask = _array(fields, "mask", "<u1", (num_tokens,))
    if mask.max(initial=0) > 1:
        raise PayloadError("a mask with values other than 0 and 1")
    arrays = {name: _array(fields, name, "<f4", (num_tokens,)) for name in _SCORE_ARRAYS}
    return TokenScores(mask=mask.astype(np.bool_), **arrays)


def _get(fields: Any, name: str, kind: type) -> Any:
    """A field of exactly this type: bool is not int, int is not float."""
    if not isinstance(fields, dict) or type(fields.get(name)) is not kind:
        raise PayloadError(f"field {name!r} is missing or not of type {kind.__name__}")
    return fields[name]


def _raw(array: Any, dtype: str) -> bytes:
    return np.ascontiguousarray(array, dtype=dtype).tobytes()


def _array(fields: Any, name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """A copy in native byte order. −1 in the shape is any size that fits, at least 1 column in two dimensions."""
    data = _get(fields, name, bytes)
    try:
        array = np.frombuffer(data, dtype=dtype).reshape(shape)
    except ValueError:
        raise PayloadError(f"field {name!r}: {len(data)} bytes do not fit shape {shape} of {dtype}") from None
    if 0 in array.shape:
        raise PayloadError(f"field {name!r} is empty")
    return array.astype(_NATIVE[dtype])


# --- rules for writing and reading ---


def _check_group(group: Group) -> None:
    try:
        GroupKey.parse(group.group_id)
    except ValueError as error:
        raise PayloadError(str(error)) from None
    where = f"group {group.group_id}"
    _require(0 < len(group.trajectories) <= _MAX_TRAJECTORIES, where, "it has no trajectories, or too many")
    _require(len(group.prompt_token_ids) > 0, where, "its prompt is empty")
    _require(math.isfinite(group.temperature) and group.temperature > 0, where, "temperature is not a positive number")
    _require(group.prompt_index >= 0 and group.dispatch_version >= 0, where, "a negative index or version")
    for trajectory in group.trajectories:
        _check_trajectory(trajectory)
    names = [trajectory.trajectory_id for trajectory in group.trajectories]
    _check_all(_are_logprobs, [t.actor_logprobs for t in group.trajectories], names, "actor_logprobs")
    topk = [(t.topk_logprobs, t.trajectory_id) for t in group.trajectories if t.topk_logprobs is not None]
    _check_all(_are_logprobs, [array for array, _ in topk], [name for _, name in topk], "topk_logprobs")


def _check_trajectory(trajectory: Trajectory) -> None:
    where, num_tokens = f"trajectory {trajectory.trajectory_id}", trajectory.num_tokens
    _require(num_tokens > 0, where, "it has no tokens")
    _check_array(trajectory.token_ids, (num_tokens,), _UINT32, where, "token_ids")
    _check_array(trajectory.actor_logprobs, (num_tokens,), _FLOAT32, where, "actor_logprobs")
    ids, logprobs = trajectory.topk_ids, trajectory.topk_logprobs
    _require((ids is None) == (logprobs is None), where, "top-k ids and log-probabilities come together or not at all")
    if ids is not None and logprobs is not None:
        _check_array(ids, (num_tokens, ids.shape[-1]), _UINT32, where, "topk_ids")
        _check_array(logprobs, ids.shape, _FLOAT16, where, "topk_logprobs")
    end = 0
    for span in trajectory.version_spans:
        _require(span.start == end < span.end and span.version >= 0, where, "its version spans are not contiguous")
        end = span.end
    _require(end == num_tokens, where, "its version spans do not cover its tokens")
    if trajectory.finish_reason not in _FINISH_REASONS:
        raise PayloadError(f"{where}: finish reason {trajectory.finish_reason!r}")
    _require(trajectory.reward is None or math.isfinite(trajectory.reward), where, "its reward is not finite")


def _check_scored(scored: ScoredGroup) -> None:
    where = f"scored group {scored.group_id}"
    _require(len(scored.scores) == len(scored.group.trajectories), where, "scores and trajectories differ in number")
    _require(math.isfinite(scored.obrs_lambda) and scored.obrs_lambda >= 0, where, "λ is not a finite number ≥ 0")
    _require(scored.policy_version >= 0, where, "a negative policy version")
    if scored.normalizer == DEFERRED:
        return  # deferred scores are not written; the reader creates them again
    names = [trajectory.trajectory_id for trajectory in scored.group.trajectories]
    for scores, trajectory in zip(scored.scores, scored.group.trajectories, strict=True):
        name, shape = f"scores of {trajectory.trajectory_id}", (trajectory.num_tokens,)
        for field in _SCORE_ARRAYS:
            _check_array(getattr(scores, field), shape, _FLOAT32, name, field)
        _check_array(scores.mask, shape, _BOOL, name, "mask")
    for field in _SCORE_ARRAYS:
        valid = {"target_logprobs": _are_logprobs, "acceptance_probs": _are_probs}.get(field, _are_finite)
        _check_all(valid, [getattr(scores, field) for scores in scored.scores], names, field)


def _check_array(array: NDArray[Any], shape: tuple[int, ...], dtype: np.dtype[Any], where: str, field: str) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise PayloadError(f"{where}: {field} is {array.dtype} {array.shape}, not {dtype} {shape}")


def _check_all(
    problem: Callable[[NDArray[Any]], str], arrays: Sequence[NDArray[Any]], names: Sequence[str], field: str
) -> None:
    """Check the arrays of all trajectories at once, and one by one only to name the wrong one. Every stage of the
    pipeline checks each group, so this must be fast."""
    if len(arrays) > 1 and not problem(np.concatenate([array.ravel() for array in arrays])):
        return
    for array, name in zip(arrays, names, strict=True):
        if complaint := problem(array):
            raise PayloadError(f"trajectory {name}: {field} {complaint}")


def _are_finite(values: NDArray[Any]) -> str:
    return "" if np.isfinite(values).all() else "is not finite"


def _are_logprobs(values: NDArray[Any]) -> str:
    valid = np.isfinite(values).all() and values.max() <= _LOGPROB_EPSILON
    return "" if valid else "are not finite log-probabilities ≤ 0"


def _are_probs(values: NDArray[Any]) -> str:
    low, high = values.min(), values.max()
    return "" if low >= 0 and high <= 1 + _LOGPROB_EPSILON else f"span [{low}, {high}], not probabilities"


def _require(condition: bool, where: str, problem: str) -> None:
    if not condition:
        raise PayloadError(f"{where}: {problem}")
