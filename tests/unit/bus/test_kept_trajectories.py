"""Kept batches: the newest few, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from bus_world import make_group, make_scored

from jackpot.bus.kept_trajectories import KeptTrajectories
from jackpot.bus.payload_format import encode_scored
from jackpot.errors import PayloadError


def test_the_newest_batches_are_kept_in_their_order(tmp_path: Path) -> None:
    kept = KeptTrajectories(tmp_path, 1 << 20)
    assert kept.batches() == []
    groups = [make_scored(make_group("job-1", slot)) for slot in range(12)]
    for batch in range(4):
        kept.write(batch, groups[3 * batch : 3 * batch + 3], keep=2)
    assert kept.batches() == [2, 3]
    assert [encode_scored(group) for group in kept.read(3)] == [encode_scored(group) for group in groups[9:]]
    assert sorted(path.name for path in (tmp_path / "trajectories").iterdir()) == ["00000002", "00000003"]


def test_a_batch_trained_again_replaces_itself(tmp_path: Path) -> None:
    kept = KeptTrajectories(tmp_path, 1 << 20)
    for slots in (range(3), range(3, 5)):
        kept.write(7, [make_scored(make_group("job-1", slot)) for slot in slots], keep=2)
    assert [group.group.slot for group in kept.read(7)] == [3, 4]


def test_none_are_kept_on_request(tmp_path: Path) -> None:
    KeptTrajectories(tmp_path, 1 << 20).write(0, [make_scored(make_group("job-1"))], keep=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "corrupt or truncated"),
        (lambda data: data + b"\1\2\3", "00000000 is truncated or damaged"),
        (lambda data: b"\xff" * 8 + data[8:], "00000000 is truncated or damaged"),
        (lambda data: data[:20] + b"\xff" + data[21:], "corrupt or truncated"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    kept = KeptTrajectories(tmp_path, 1 << 20)
    kept.write(0, [make_scored(make_group("job-1", slot)) for slot in range(2)], keep=1)
    path = tmp_path / "trajectories" / "00000000"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(PayloadError, match=message):
        kept.read(0)
