"""The codec: what is written is read back to the bit, and whatever else is read is refused in order."""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
import zstandard
from bus_world import make_group, make_scored, plain
from hypothesis import given, settings
from hypothesis import strategies as st

from jackpot.bus.payload_format import SCHEMA_VERSION, decode_group, decode_scored, encode_group, encode_scored
from jackpot.errors import PayloadError
from jackpot.trajectory import DEFERRED, Group, ScoredGroup, VersionSpan, unscored

GROUP = make_group("codec-1", 3)
SCORED = make_scored(GROUP)
HEADER_BYTES = 20
WHOLE = VersionSpan(0, 0, 6)


def sealed(
    body: bytes, *, kind: int = 1, version: int = SCHEMA_VERSION, flags: int = 0, size: int | None = None
) -> bytes:
    """An envelope with a right checksum around any body."""
    head = struct.pack("<4sBBBxQ", b"JKPT", version, kind, flags, len(body) if size is None else size)
    return head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))) + body


def fields_of(data: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = msgpack.unpackb(data[HEADER_BYTES:])
    return fields


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("top_k", [None, 1, 20])
def test_groups_come_back_to_the_bit(compress: bool, top_k: int | None) -> None:
    group = make_group("codec-1", 5, top_k=top_k, size=3)
    assert plain(decode_group(encode_group(group, compress=compress))) == plain(group)
    scored = make_scored(group)
    assert plain(decode_scored(encode_scored(scored, compress=compress))) == plain(scored)


def test_trajectories_of_a_group_may_differ_in_length_and_candidates() -> None:
    groups = [make_group("codec-1", 5, top_k=top_k, size=3) for top_k in (3, None, 5)]
    mixed = tuple(group.trajectories[place] for place, group in enumerate(groups))
    group = dataclasses.replace(groups[0], trajectories=mixed)
    assert plain(decode_group(encode_group(group))) == plain(group)
    assert plain(decode_scored(encode_scored(make_scored(group)))) == plain(make_scored(group))


def test_scores_that_stand_for_none_are_not_written_and_come_back_as_such() -> None:
    scores = tuple(unscored(trajectory) for trajectory in GROUP.trajectories)
    deferred = dataclasses.replace(SCORED, scores=scores, normalizer=DEFERRED)
    data = encode_scored(deferred)
    assert fields_of(data)["scores"] is None
    assert plain(decode_scored(data)) == plain(deferred)


def test_decoded_arrays_belong_to_the_caller() -> None:
    group = decode_group(encode_group(GROUP))
    group.trajectories[0].token_ids[0] = 1
    assert group.trajectories[0].token_ids[0] == 1


def test_compression_shrinks_real_looking_groups() -> None:
    ids = np.arange(4096, dtype=np.uint32) % 50
    logprobs = np.full(4096, -0.5, np.float32)
    trajectory = dataclasses.replace(
        GROUP.trajectories[0], token_ids=ids, actor_logprobs=logprobs, topk_ids=None, topk_logprobs=None,
        version_spans=(VersionSpan(0, 0, 4096),),
    )  # fmt: skip
    group = dataclasses.replace(GROUP, trajectories=(trajectory,))
    assert len(encode_group(group, compress=True)) < len(encode_group(group)) / 10


SEALED = [
    encode(value, compress=c) for encode, value in ((encode_group, GROUP), (encode_scored, SCORED)) for c in (0, 1)
]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(range(4)), st.data())
def test_damage_is_always_a_payload_error(which: int, data: st.DataObject) -> None:
    whole = SEALED[which]
    decode: Callable[[bytes], Group | ScoredGroup] = decode_group if which < 2 else decode_scored
    if data.draw(st.booleans(), "truncate"):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        flips = data.draw(st.dictionaries(st.integers(0, len(whole) - 1), st.integers(1, 255), min_size=1, max_size=8))
        damaged = bytes(byte ^ flips.get(index, 0) for index, byte in enumerate(whole))
    with pytest.raises(PayloadError):
        decode(damaged)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_body_under_a_right_checksum_is_a_payload_error(body: bytes, compress: bool) -> None:
    stored = zstandard.compress(body, 1) if compress else body
    with pytest.raises(PayloadError):
        decode_group(sealed(stored, flags=int(compress), size=len(body)))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_wrong_fields_under_a_right_checksum_are_refused_or_valid(data: st.DataObject) -> None:
    fields = fields_of(encode_scored(SCORED))
    target = data.draw(
        st.sampled_from([fields, fields["group"], fields["group"]["trajectories"][0], fields["scores"][0]])
    )
    target[data.draw(st.sampled_from(sorted(target)))] = data.draw(JSON)
    try:
        scored = decode_scored(sealed(msgpack.packb(fields), kind=2))
    except PayloadError:
        return
    assert plain(decode_scored(encode_scored(scored))) == plain(scored)


def test_sizes_are_refused_before_anything_is_allocated() -> None:
    with pytest.raises(PayloadError, match=r"oversized: 1099511627776 bytes, the limit is 1000"):
        decode_group(sealed(b"", size=1 << 40), max_bytes=1000)
    # The header says little, the frame says much: zstd would believe its frame.
    bomb = zstandard.compress(bytes(50 << 20), 1)
    with pytest.raises(PayloadError, match="differs from the header"):
        decode_group(sealed(bomb, flags=1, size=1000), max_bytes=1000)
    with pytest.raises(PayloadError, match=r"oversized: 52428800 bytes"):
        decode_group(sealed(bomb, flags=1, size=50 << 20), max_bytes=1000)
    # Frames of unknown size, trailing frames, nested arrays that claim a million elements each.
    streamed = zstandard.ZstdCompressor().compressobj()
    unknown = streamed.compress(b"x" * 100) + streamed.flush()
    with pytest.raises(PayloadError, match="differs"):
        decode_group(sealed(unknown, flags=1, size=100))
    with pytest.raises(PayloadError, match="cannot be decompressed"):
        decode_group(sealed(zstandard.compress(b"x") + b"more", flags=1, size=1))
    nested = b"\xdd\x00\x0f\x42\x40" * 1000
    with pytest.raises(PayloadError, match="not msgpack"):
        decode_group(sealed(nested))


def test_writers_refuse_what_is_too_large() -> None:
    with pytest.raises(PayloadError, match=r"exceed the limit of 100. Raise bus.max_payload_bytes"):
        encode_group(GROUP, max_bytes=100)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated: 0 bytes"),
        (b"PK" + encode_group(GROUP)[2:], "wrong magic"),
        (sealed(b"", version=2), "schema version 2, this process reads 1"),
        (sealed(b"", kind=2), "kind 2 with flags 0x0 where kind 1"),
        (sealed(b"", flags=4), "flags 0x4"),
        (sealed(b"\x90"), "the body is a list"),
        (sealed(b"\x80"), "'group_id' is missing"),
    ],
)
def test_refusals_say_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        decode_group(data)


def changed(**fields: Any) -> Group:
    return dataclasses.replace(GROUP, **fields)


def changed_trajectory(**fields: Any) -> Group:
    return changed(trajectories=(dataclasses.replace(GROUP.trajectories[0], **fields),))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (changed(group_id="elsewhere"), "is not a group id"),
        (changed(trajectories=()), "no trajectories"),
        (changed(temperature=0.0), "temperature"),
        (changed(temperature=float("nan")), "temperature"),
        (changed(metadata={"x": float("inf")}), "metadata must be JSON values"),
        (changed(metadata={"x": object()}), "metadata must be JSON values"),
        (changed_trajectory(token_ids=np.zeros(6, np.int64)), r"token_ids is int64 \(6,\), not uint32 \(6,\)"),
        (changed_trajectory(actor_logprobs=np.zeros(5, np.float32)), "actor_logprobs is"),
        (changed_trajectory(actor_logprobs=np.full(6, 0.1, np.float32)), "not finite log-probabilities ≤ 0"),
        (changed_trajectory(actor_logprobs=np.full(6, -np.inf, np.float32)), "not finite log-probabilities"),
        (changed_trajectory(topk_logprobs=None), "come together"),
        (changed_trajectory(topk_logprobs=np.zeros((6, 3), np.float32)), "topk_logprobs is float32"),
        (changed_trajectory(version_spans=()), "do not cover"),
        (changed_trajectory(version_spans=(VersionSpan(0, 0, 5),)), "do not cover"),
        (changed_trajectory(version_spans=(VersionSpan(0, 0, 7),)), "do not cover"),
        (changed_trajectory(version_spans=(VersionSpan(0, 0, 2), VersionSpan(1, 3, 6))), "not contiguous"),
        (changed_trajectory(finish_reason="eos"), "finish reason 'eos'"),
        (changed_trajectory(reward=float("nan")), "reward is not finite"),
    ],
)
def test_writers_refuse_groups_that_break_a_rule(group: Group, message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        encode_group(group)


@pytest.mark.parametrize("field", ["actor_logprobs", "topk_logprobs"])
@pytest.mark.parametrize("place", [0, 2])
def test_the_one_trajectory_that_breaks_a_rule_is_named(place: int, field: str) -> None:
    trajectories = list(make_group("codec-1", 5, top_k=20, size=3).trajectories)
    one = trajectories[place]
    trajectories[place] = dataclasses.replace(one, **{field: np.full_like(getattr(one, field), np.nan)})
    with pytest.raises(PayloadError, match=f"{one.trajectory_id}: {field} are not finite"):
        encode_group(changed(trajectories=tuple(trajectories)))


def test_two_of_the_same_name_are_both_checked() -> None:
    good = GROUP.trajectories[0]
    assert good.topk_logprobs is not None
    bad = dataclasses.replace(good, topk_logprobs=np.full_like(good.topk_logprobs, np.nan))
    with pytest.raises(PayloadError, match="topk_logprobs are not finite"):
        encode_group(changed(trajectories=(bad, good)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_logprobs": np.full(6, 0.5, np.float32)}, "target_logprobs are not finite log-probabilities"),
        ({"acceptance_probs": np.full(6, 1.5, np.float32)}, "acceptance_probs span"),
        ({"normalizer_head": np.full(6, np.nan, np.float32)}, "normalizer_head is not finite"),
        ({"mask": np.ones(6, np.uint8)}, "mask is uint8"),
    ],
)
def test_writers_refuse_scores_that_break_a_rule(fields: dict[str, Any], message: str) -> None:
    scores = (dataclasses.replace(SCORED.scores[0], **fields), SCORED.scores[1])
    with pytest.raises(PayloadError, match=message):
        encode_scored(dataclasses.replace(SCORED, scores=scores))


def test_readers_refuse_masks_that_are_neither_0_nor_1() -> None:
    fields = fields_of(encode_scored(SCORED))
    mask = fields["scores"][1]["mask"]
    for byte in (1, 2, 255):
        fields["scores"][1]["mask"] = mask[:-1] + bytes([byte])
        data = sealed(msgpack.packb(fields), kind=2)
        if byte == 1:
            assert decode_scored(data).scores[1].mask[-1]
        else:
            with pytest.raises(PayloadError, match="a mask with values other than 0 and 1"):
                decode_scored(data)


def test_scores_and_trajectories_must_match_in_number() -> None:
    with pytest.raises(PayloadError, match="differ in number"):
        encode_scored(dataclasses.replace(SCORED, scores=SCORED.scores[:1]))
