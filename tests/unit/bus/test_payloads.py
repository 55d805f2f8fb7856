"""The file payload store. (The Redis one needs a server: tests/integration/test_bus.py covers both.)"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from jackpot.bus.payloads import ENVELOPE_BYTES, FilePayloads, group_of, payload_name
from jackpot.errors import BusError, PayloadError, PayloadMissingError

GROUP_ID = "job-1.s3.e0.p9.a0"


def test_names_are_new_each_time_and_say_their_group() -> None:
    first, second = payload_name(GROUP_ID, "rollout"), payload_name(GROUP_ID, "rollout")
    assert first != second
    assert group_of(first) == group_of(second) == GROUP_ID


async def test_payloads_come_back_and_go(tmp_path: Path) -> None:
    store = FilePayloads(tmp_path / "payloads", max_bytes=100)
    name = payload_name(GROUP_ID, "rollout")
    assert await store.put(name, b"bytes") == b""  # nothing for the script to store
    assert await store.get(name) == b"bytes"
    assert [path.name for path in (tmp_path / "payloads").iterdir()] == [name]
    await store.delete(name)
    await store.delete(name)
    with pytest.raises(PayloadMissingError):
        await store.get(name)


async def test_oversized_files_are_not_read(tmp_path: Path) -> None:
    store = FilePayloads(tmp_path, max_bytes=100)
    (tmp_path / "large").write_bytes(bytes(101 + ENVELOPE_BYTES))
    with pytest.raises(PayloadError, match=r"more than bus.max_payload_bytes allows"):
        await store.get("large")


async def test_names_cannot_leave_the_directory(tmp_path: Path) -> None:
    store = FilePayloads(tmp_path / "payloads", max_bytes=100)
    for name in ("../secret", "/etc/passwd", "a/b", "", "."):
        with pytest.raises(PayloadError, match="not a payload's name"):
            await store.get(name)


async def test_a_full_disk_is_a_bus_error_and_leaves_nothing(tmp_path: Path) -> None:
    store = FilePayloads(tmp_path, max_bytes=100)
    name = payload_name(GROUP_ID, "rollout")
    (tmp_path / f"{name}.tmp").symlink_to("/dev/full")
    with pytest.raises(BusError, match="No space left on device"):
        await store.put(name, b"bytes")
    assert list(tmp_path.iterdir()) == []


async def test_sweeping_removes_payloads_of_the_selected_groups_only(tmp_path: Path) -> None:
    store = FilePayloads(tmp_path, max_bytes=100)
    other = "job-1.s4.e0.p9.a0"
    kept = payload_name(other, "scored")
    for name in (payload_name(GROUP_ID, "rollout"), f"{payload_name(GROUP_ID, 'scored')}.tmp", kept):
        await store.put(name, b"bytes")

    async def ended(group_ids: Sequence[str]) -> set[str]:
        assert group_ids == [GROUP_ID, other]
        return {GROUP_ID}

    assert await store.sweep(ended) == 2
    assert [path.name for path in tmp_path.iterdir()] == [kept]
