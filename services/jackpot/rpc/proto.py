"""Trajectories, groups and scores as protocol buffers: arrays as raw little-endian bytes.

Reading checks every length against the message's shape; a mismatch is a PayloadError that names the trajectory and
the field. The caller owns the arrays that it receives (writable, native byte order).
Rewards and a group's metadata stay with the orchestrator: they do not travel over gRPC.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from jackpot.errors import PayloadError
from jackpot.storage.weight_probe import METADATA_KEY, WeightProbe
from jackpot.trajectory import FinishReason, Group, GroupKey, ScoredGroup, TokenScores, Trajectory, VersionSpan
from jackpot.v1 import rollout_pb2, scoring_pb2, trajectory_pb2

_FINISH_TO_PROTO: dict[FinishReason, trajectory_pb2.FinishReason] = {
    "stop": trajectory_pb2.FINISH_REASON_STOP,
    "length": trajectory_pb2.FINISH_REASON_LENGTH,
}
_FINISH_FROM_PROTO: dict[int, FinishReason] = {int(value): name for name, value in _FINISH_TO_PROTO.items()}


def ids_to_bytes(ids: Sequence[int] | NDArray[np.uint32]) -> bytes:
    """Token ids in the wire format: uint32, little-endian."""
    return _to_bytes(np.asarray(ids), "<u4")


def ids_from_bytes(data: bytes, where: str = "token ids") -> NDArray[np.uint32]:
    """Token ids ``[n]`` from the wire.

    Raises:
        PayloadError: the length is not a multiple of four bytes.
    """
    if len(data) % 4:
        raise PayloadError(f"{where}: {len(data)} bytes are not a whole number of uint32. Send little-endian uint32.")
    return _from_bytes(data, np.uint32, (len(data) // 4,), where)


def trajectory_to_proto(trajectory: Trajectory) -> trajectory_pb2.Trajectory:
    """The message for a trajectory, without its reward."""
    message = trajectory_pb2.Trajectory(
        trajectory_id=trajectory.trajectory_id,
        num_tokens=trajectory.num_tokens,
        token_ids=_to_bytes(trajectory.token_ids, "<u4"),
        actor_logprobs=_to_bytes(trajectory.actor_logprobs, "<f4"),
        version_spans=[
            trajectory_pb2.VersionSpan(version=span.version, start=span.start, end=span.end)
            for span in trajectory.version_spans
        ],
        finish_reason=_FINISH_TO_PROTO[trajectory.finish_reason],
    )
    if trajectory.topk_ids is not None and trajectory.topk_logprobs is not None:
        message.top_k = trajectory.topk_ids.shape[1]
        message.topk_ids = _to_bytes(trajectory.topk_ids, "<u4")
        message.topk_logprobs = _to_bytes(trajectory.topk_logprobs, "<f2")
    return message


def trajectory_from_proto(message: trajectory_pb2.Trajectory) -> Trajectory:
    """The trajectory in a message.

    Raises:
        PayloadError: an array has the wrong length, the version spans leave tokens uncovered, or there are no tokens.
    """
    where, num_tokens, top_k = message.trajectory_id, message.num_tokens, message.top_k
    if num_tokens == 0:
        raise PayloadError(f"trajectory {where!r} has no tokens. A completion holds at least its stop token.")
    if message.finish_reason not in _FINISH_FROM_PROTO:
        raise PayloadError(f"trajectory {where!r}: finish reason {message.finish_reason} is unknown.")
    if not top_k and (message.topk_ids or message.topk_logprobs):
        raise PayloadError(f"trajectory {where!r}: top-k arrays without top_k. Set top_k to their width.")
    shape, wide = (num_tokens,), (num_tokens, top_k)
    return Trajectory(
        trajectory_id=message.trajectory_id,
        token_ids=_from_bytes(message.token_ids, np.uint32, shape, f"{where} token_ids"),
        actor_logprobs=_from_bytes(message.actor_logprobs, np.float32, shape, f"{where} actor_logprobs"),
        topk_ids=_from_bytes(message.topk_ids, np.uint32, wide, f"{where} topk_ids") if top_k else None,
        topk_logprobs=_from_bytes(message.topk_logprobs, np.float16, wide, f"{where} topk_logprobs") if top_k else None,
        version_spans=_spans(message),
        finish_reason=_FINISH_FROM_PROTO[message.finish_reason],
    )


def group_to_proto(group: Group) -> trajectory_pb2.Group:
    """The message for a group, without rewards and metadata."""
    return trajectory_pb2.Group(
        group_id=group.group_id,
        prompt_token_ids=_to_bytes(group.prompt_token_ids, "<u4"),
        trajectories=[trajectory_to_proto(trajectory) for trajectory in group.trajectories],
        temperature=group.temperature,
        dispatch_version=group.dispatch_version,
    )


def group_from_proto(message: trajectory_pb2.Group) -> Group:
    """The group in a message.

    Raises:
        PayloadError: the id is not a group id, there are no trajectories, or one of them is malformed.
    """
    try:
        prompt_index = GroupKey.parse(message.group_id).prompt_index
    except ValueError as error:
        raise PayloadError(f"{error}") from None
    if not message.trajectories:
        raise PayloadError(f"group {message.group_id!r} has no trajectories. Send all siblings of its prompt.")
    return Group(
        group_id=message.group_id,
        prompt_index=prompt_index,
        prompt_token_ids=ids_from_bytes(message.prompt_token_ids, f"{message.group_id} prompt_token_ids"),
        trajectories=tuple(trajectory_from_proto(trajectory) for trajectory in message.trajectories),
        temperature=message.temperature,
        dispatch_version=message.dispatch_version,
    )


def scores_to_proto(scores: TokenScores) -> scoring_pb2.TokenScores:
    """The message for one trajectory's scores."""
    return scoring_pb2.TokenScores(
        target_logprobs=_to_bytes(scores.target_logprobs, "<f4"),
        acceptance_probs=_to_bytes(scores.acceptance_probs, "<f4"),
        mask=_to_bytes(scores.mask, "<u1"),
        normalizer_head=_to_bytes(scores.normalizer_head, "<f4"),
        normalizer_tail=_to_bytes(scores.normalizer_tail, "<f4"),
        topk_mass=_to_bytes(scores.topk_mass, "<f4"),
    )


def scores_from_proto(message: scoring_pb2.TokenScores, num_tokens: int, where: str) -> TokenScores:
    """The scores in a message, each array ``[num_tokens]``; ``where`` names the trajectory in errors.

    Raises:
        PayloadError: an array has another length, or the mask holds something other than 0 and 1.
    """
    shape = (num_tokens,)
    mask = _from_bytes(message.mask, np.uint8, shape, f"{where} mask")
    if mask.max(initial=0) > 1:
        raise PayloadError(f"{where} mask: holds {mask.max()}, but only 0 (rejected) and 1 (accepted) have a meaning.")

    def floats(name: str) -> NDArray[np.float32]:
        return _from_bytes(getattr(message, name), np.float32, shape, f"{where} {name}")

    return TokenScores(
        target_logprobs=floats("target_logprobs"),
        acceptance_probs=floats("acceptance_probs"),
        mask=mask.astype(np.bool_),
        normalizer_head=floats("normalizer_head"),
        normalizer_tail=floats("normalizer_tail"),
        topk_mass=floats("topk_mass"),
    )


def scored_group_to_proto(scored: ScoredGroup) -> scoring_pb2.ScoreResponse:
    """The answer to a Score call: the scores without the group, which the caller has."""
    return scoring_pb2.ScoreResponse(
        group_id=scored.group_id,
        scores=[scores_to_proto(scores) for scores in scored.scores],
        obrs_lambda=scored.obrs_lambda,
        policy_version=scored.policy_version,
        normalizer=scored.normalizer,
    )


def scored_group_from_proto(group: Group, message: scoring_pb2.ScoreResponse) -> ScoredGroup:
    """The sent group with the scores of a Score call's answer.

    Raises:
        PayloadError: the answer belongs to another group or does not fit its trajectories.
    """
    if message.group_id != group.group_id or len(message.scores) != len(group.trajectories):
        raise PayloadError(
            f"asked for scores of {group.group_id!r} ({len(group.trajectories)} trajectories), "
            f"got {message.group_id!r} ({len(message.scores)} trajectories)."
        )
    return ScoredGroup(
        group=group,
        scores=tuple(
            scores_from_proto(scores, trajectory.num_tokens, trajectory.trajectory_id)
            for scores, trajectory in zip(message.scores, group.trajectories, strict=True)
        ),
        obrs_lambda=message.obrs_lambda,
        policy_version=message.policy_version,
        normalizer=message.normalizer,
    )


def _spans(message: trajectory_pb2.Trajectory) -> tuple[VersionSpan, ...]:
    spans = tuple(VersionSpan(span.version, span.start, span.end) for span in message.version_spans)
    if not _cover(spans, message.num_tokens):
        told = ", ".join(f"[{span.start}, {span.end})" for span in spans) or "none"
        raise PayloadError(
            f"trajectory {message.trajectory_id!r}: version spans {told} do not cover its {message.num_tokens} "
            "tokens one after the other."
        )
    return spans


def _cover(spans: Iterable[VersionSpan], num_tokens: int) -> bool:
    reached = 0
    for span in spans:
        if span.start != reached or span.end <= span.start:
            return False
        reached = span.end
    return reached == num_tokens


def _to_bytes(array: NDArray[Any], dtype: str) -> bytes:
    return np.ascontiguousarray(array, dtype=dtype).tobytes()


def _from_bytes(data: bytes, dtype: DTypeLike, shape: tuple[int, ...], where: str) -> NDArray[Any]:
    little_endian = np.dtype(dtype).newbyteorder("<")
    expected = little_endian.itemsize * math.prod(shape)  # not numpy's, which takes longer than everything else here
    if len(data) != expected:
        raise PayloadError(f"{where}: {len(data)} bytes where shape {shape} of {np.dtype(dtype)} takes {expected}.")
    # A copy: arrays over another object's bytes are read-only, which torch warns about.
    return np.frombuffer(data, dtype=little_endian).reshape(shape).astype(dtype)


def probe_to_proto(probe: WeightProbe | None) -> rollout_pb2.TransferFinish:
    """The last stage of a broadcast, with the version's probe."""
    if probe is None:
        return rollout_pb2.TransferFinish()
    return rollout_pb2.TransferFinish(probe=rollout_pb2.WeightProbe(**probe.as_json()))


def probe_from_proto(finish: rollout_pb2.TransferFinish) -> WeightProbe | None:
    """The reverse of :func:`probe_to_proto`.

    Raises:
        WeightCorruptError: a probe that cannot be used.
    """
    if not finish.HasField("probe"):
        return None
    probe = finish.probe
    content = WeightProbe(list(probe.token_ids), list(probe.logprobs), list(probe.initial_logprobs), probe.dtype)
    return WeightProbe.from_metadata({METADATA_KEY: content.as_json()})
