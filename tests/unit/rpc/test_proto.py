import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jackpot.errors import PayloadError
from jackpot.rpc.proto import (
    group_from_proto,
    group_to_proto,
    ids_from_bytes,
    ids_to_bytes,
    scored_group_from_proto,
    scored_group_to_proto,
    scores_from_proto,
    scores_to_proto,
    trajectory_from_proto,
    trajectory_to_proto,
)
from jackpot.trajectory import Group, ScoredGroup, TokenScores, Trajectory, VersionSpan
from jackpot.v1 import scoring_pb2, trajectory_pb2

GROUP_ID = "job.s4.e0.p7.a1"


def make_trajectory(num_tokens: int = 3, top_k: int | None = 2, index: int = 0, seed: int = 0) -> Trajectory:
    rng = np.random.default_rng(seed)
    split = num_tokens // 2
    spans = [VersionSpan(4, 0, split)] if split else []
    return Trajectory(
        trajectory_id=f"{GROUP_ID}#{index}",
        token_ids=rng.integers(0, 2**32, num_tokens, dtype=np.uint32),
        actor_logprobs=-rng.random(num_tokens, dtype=np.float32),
        topk_ids=None if top_k is None else rng.integers(0, 2**32, (num_tokens, top_k), dtype=np.uint32),
        topk_logprobs=None if top_k is None else -rng.random((num_tokens, top_k)).astype(np.float16),
        version_spans=(*spans, VersionSpan(5, split, num_tokens)),
        finish_reason="length" if index % 2 else "stop",
        reward=1.0,
    )


def make_group(num_trajectories: int = 2) -> Group:
    return Group(
        group_id=GROUP_ID,
        prompt_index=7,
        prompt_token_ids=np.array([1, 2, 4_000_000_000], np.uint32),
        trajectories=tuple(make_trajectory(3 + i, index=i, seed=i) for i in range(num_trajectories)),
        temperature=0.7,
        dispatch_version=4,
        metadata={"difficulty": 1},
    )


def make_scores(num_tokens: int, seed: int = 0) -> TokenScores:
    rng = np.random.default_rng(seed)

    def floats() -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        return rng.random(num_tokens, dtype=np.float32)

    return TokenScores(
        target_logprobs=-floats(),
        acceptance_probs=floats(),
        mask=rng.random(num_tokens) < 0.5,
        normalizer_head=floats(),
        normalizer_tail=floats(),
        topk_mass=floats(),
    )


def assert_same_trajectory(got: Trajectory, expected: Trajectory) -> None:
    for name in ("token_ids", "actor_logprobs", "topk_ids", "topk_logprobs"):
        a, b = getattr(got, name), getattr(expected, name)
        if b is None:
            assert a is None
        else:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    assert (got.trajectory_id, got.version_spans, got.finish_reason) == (
        expected.trajectory_id,
        expected.version_spans,
        expected.finish_reason,
    )


@settings(deadline=None, max_examples=30)
@given(num_tokens=st.integers(1, 40), top_k=st.none() | st.integers(1, 24), seed=st.integers(0, 99))
def test_a_trajectory_survives_the_wire_bit_for_bit(num_tokens: int, top_k: int | None, seed: int) -> None:
    trajectory = make_trajectory(num_tokens, top_k, index=seed, seed=seed)
    data = trajectory_to_proto(trajectory).SerializeToString()
    got = trajectory_from_proto(trajectory_pb2.Trajectory.FromString(data))
    assert_same_trajectory(got, trajectory)
    assert got.reward is None  # rewards stay with the orchestrator


def test_a_group_survives_the_wire_without_reward_and_metadata() -> None:
    group = make_group()
    got = group_from_proto(trajectory_pb2.Group.FromString(group_to_proto(group).SerializeToString()))
    assert (got.group_id, got.prompt_index, got.temperature, got.dispatch_version) == (GROUP_ID, 7, 0.7, 4)
    assert (got.slot, got.oldest_version, got.num_tokens) == (4, 4, 7)
    np.testing.assert_array_equal(got.prompt_token_ids, group.prompt_token_ids)
    for a, b in zip(got.trajectories, group.trajectories, strict=True):
        assert_same_trajectory(a, b)
    assert got.metadata == {}


def test_scores_survive_the_wire_bit_for_bit() -> None:
    group = make_group()
    scores = tuple(make_scores(trajectory.num_tokens, i) for i, trajectory in enumerate(group.trajectories))
    scored = ScoredGroup(group=group, scores=scores, obrs_lambda=1.5, policy_version=6, normalizer="tail")
    message = scoring_pb2.ScoreResponse.FromString(scored_group_to_proto(scored).SerializeToString())
    got = scored_group_from_proto(group, message)
    assert got.group is group
    assert (got.obrs_lambda, got.policy_version, got.normalizer) == (1.5, 6, "tail")
    for a, b in zip(got.scores, scores, strict=True):
        for name in TokenScores.__dataclass_fields__:
            assert getattr(a, name).dtype == getattr(b, name).dtype
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_arrays_are_little_endian_on_the_wire() -> None:
    assert ids_to_bytes([1, 258]) == bytes([1, 0, 0, 0, 2, 1, 0, 0])
    assert ids_from_bytes(bytes([1, 0, 0, 0, 2, 1, 0, 0])).tolist() == [1, 258]
    logprobs = np.array([-1.0, -2.0, -0.5], ">f4")
    message = trajectory_to_proto(dataclasses.replace(make_trajectory(), actor_logprobs=logprobs))
    assert message.actor_logprobs.hex() == "000080bf" + "000000c0" + "000000bf"


def test_arrays_from_the_wire_are_the_callers_own() -> None:
    got = trajectory_from_proto(trajectory_to_proto(make_trajectory()))
    assert got.token_ids.flags.writeable and got.token_ids.dtype.isnative
    assert got.topk_logprobs is not None and got.topk_logprobs.flags.writeable


def _no_tokens(m: trajectory_pb2.Trajectory) -> None:
    m.num_tokens = 0


def _short_ids(m: trajectory_pb2.Trajectory) -> None:
    m.token_ids = m.token_ids[:-1]


def _short_topk(m: trajectory_pb2.Trajectory) -> None:
    m.topk_logprobs = m.topk_logprobs[:-2]


def _topk_without_width(m: trajectory_pb2.Trajectory) -> None:
    m.top_k = 0


def _no_finish(m: trajectory_pb2.Trajectory) -> None:
    m.finish_reason = trajectory_pb2.FINISH_REASON_UNSPECIFIED


def _gap(m: trajectory_pb2.Trajectory) -> None:
    m.version_spans[1].start = 2


def _too_far(m: trajectory_pb2.Trajectory) -> None:
    m.version_spans[1].end = 4


def _no_spans(m: trajectory_pb2.Trajectory) -> None:
    del m.version_spans[:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_tokens, "has no tokens"),
        (_short_ids, r"token_ids: 11 bytes where shape \(3,\) of uint32 takes 12"),
        (_short_topk, r"topk_logprobs: 10 bytes where shape \(3, 2\) of float16 takes 12"),
        (_topk_without_width, "top-k arrays without top_k"),
        (_no_finish, "finish reason 0 is unknown"),
        (_gap, r"version spans \[0, 1\), \[2, 3\) do not cover its 3 tokens"),
        (_too_far, r"version spans \[0, 1\), \[1, 4\) do not cover"),
        (_no_spans, "version spans none do not cover"),
    ],
)
def test_a_damaged_trajectory_is_refused_by_name(
    damage: Callable[[trajectory_pb2.Trajectory], None], message: str
) -> None:
    proto = trajectory_to_proto(make_trajectory())
    damage(proto)
    with pytest.raises(PayloadError, match=message) as caught:
        trajectory_from_proto(proto)
    assert f"{GROUP_ID}#0" in str(caught.value)


def test_a_group_needs_an_id_and_trajectories() -> None:
    proto = group_to_proto(make_group())
    proto.group_id = "somebody"
    with pytest.raises(PayloadError, match="'somebody' is not a group id"):
        group_from_proto(proto)
    with pytest.raises(PayloadError, match="has no trajectories"):
        group_from_proto(trajectory_pb2.Group(group_id=GROUP_ID))
    with pytest.raises(PayloadError, match="3 bytes are not a whole number of uint32"):
        ids_from_bytes(b"abc")


def test_scores_that_do_not_fit_are_refused() -> None:
    message = scores_to_proto(make_scores(3))
    with pytest.raises(PayloadError, match=r"t#0 mask: 3 bytes where shape \(4,\)"):
        scores_from_proto(message, 4, "t#0")
    message.mask = bytes([0, 1, 2])
    with pytest.raises(PayloadError, match="t#0 mask: holds 2"):
        scores_from_proto(message, 3, "t#0")
    group = make_group()
    with pytest.raises(PayloadError, match=r"2 trajectories\), got 'other' \(0 trajectories"):
        scored_group_from_proto(group, scoring_pb2.ScoreResponse(group_id="other"))
