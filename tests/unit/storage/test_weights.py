import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from patience import PATIENCE_SECONDS

from jackpot.errors import DeadlineError, WeightCorruptError, WeightError, WeightMissingError
from jackpot.storage.weights import WeightStore, wait_for_version


def writing(content: bytes) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(content)

    return write


def publish(store: WeightStore, *versions: int) -> None:
    for version in versions:
        store.publish("policy", version, writing(b"weights %d" % version), {"obrs_lambda": 1.0})


@pytest.fixture
def store(tmp_path: Path) -> WeightStore:
    return WeightStore(tmp_path)


def test_a_published_version_is_found_with_its_metadata_and_verified(store: WeightStore, tmp_path: Path) -> None:
    store.publish("policy", 3, writing(b"abc"), {"obrs_lambda": 1.25})
    latest = WeightStore(tmp_path).latest("policy")
    assert latest is not None
    assert (latest.role, latest.version, latest.metadata) == ("policy", 3, {"obrs_lambda": 1.25})
    assert latest.files["model.safetensors"].bytes == 3
    # The digest of "abc" from FIPS 180-2.
    assert latest.files["model.safetensors"].sha256 == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    assert store.open("policy", 3) == tmp_path / "policy" / "00000003"
    assert (store.open("policy", 3) / "model.safetensors").read_bytes() == b"abc"
    assert store.manifest("policy", 3) == latest


def test_roles_are_apart(store: WeightStore) -> None:
    publish(store, 0)
    assert store.latest("actor") is None
    assert store.versions("actor") == []


def test_latest_never_moves_backwards(store: WeightStore) -> None:
    publish(store, 5, 2)
    latest = store.latest("policy")
    assert latest is not None and latest.version == 5
    assert store.versions("policy") == [2, 5]


def test_publishing_an_intact_version_again_does_not_write_it(store: WeightStore) -> None:
    publish(store, 1)
    mark = store.mark("policy")

    def refuse(directory: Path) -> None:
        raise AssertionError("written again")

    assert store.publish("policy", 1, refuse, {"obrs_lambda": 9.0}).metadata == {"obrs_lambda": 1.0}
    assert store.mark("policy") == mark  # nobody is made to look again


def test_publishing_again_completes_a_publication_that_died_before_latest_moved(
    store: WeightStore, tmp_path: Path
) -> None:
    publish(store, 1, 2)
    (tmp_path / "policy" / "LATEST").write_text("1\n")
    publish(store, 2)
    latest = store.latest("policy")
    assert latest is not None and latest.version == 2


def test_a_damaged_version_is_refused_and_can_be_published_again(store: WeightStore, tmp_path: Path) -> None:
    publish(store, 1)
    (tmp_path / "policy" / "00000001" / "model.safetensors").write_bytes(b"weights X")
    with pytest.raises(WeightCorruptError, match=r"model.safetensors does not match its manifest \(9 bytes"):
        store.open("policy", 1)
    publish(store, 1)
    assert (store.open("policy", 1) / "model.safetensors").read_bytes() == b"weights 1"


def test_a_truncated_or_missing_file_is_corrupt(store: WeightStore, tmp_path: Path) -> None:
    publish(store, 1, 2)
    (tmp_path / "policy" / "00000001" / "model.safetensors").write_bytes(b"weig")
    (tmp_path / "policy" / "00000002" / "model.safetensors").unlink()
    with pytest.raises(WeightCorruptError, match="4 bytes"):
        store.open("policy", 1)
    with pytest.raises(WeightCorruptError, match="missing although its manifest names it"):
        store.open("policy", 2)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"role": "policy"}',
        '{"role": "actor", "version": 1, "files": {}, "metadata": {}}',
        '{"role": "policy", "version": 2, "files": {}, "metadata": {}}',
        '{"role": "policy", "version": 1, "files": {"../x": {"sha256": "", "bytes": 0}}, "metadata": {}}',
    ],
)
def test_a_manifest_that_is_not_this_versions_is_corrupt(store: WeightStore, tmp_path: Path, text: str) -> None:
    publish(store, 1)
    (tmp_path / "policy" / "00000001" / "manifest.json").write_text(text)
    with pytest.raises(WeightCorruptError, match=r"00000001/manifest\.json"):
        store.manifest("policy", 1)


def test_a_damaged_latest_file_is_named(store: WeightStore, tmp_path: Path) -> None:
    publish(store, 1)
    (tmp_path / "policy" / "LATEST").write_text("soon")
    with pytest.raises(WeightCorruptError, match="LATEST holds 'soon'"):
        store.latest("policy")


def test_a_version_that_was_never_published_is_missing(store: WeightStore) -> None:
    with pytest.raises(WeightMissingError, match="version 7 of the policy's weights"):
        store.open("policy", 7)


def test_negative_versions_and_empty_writes_are_refused_and_leave_nothing(store: WeightStore, tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="weight version -1 is negative"):
        publish(store, -1)
    with pytest.raises(WeightError, match="has no files"):
        store.publish("policy", 0, lambda directory: None, {})
    assert os.listdir(tmp_path / "policy") == []


def test_a_write_that_fails_leaves_nothing(store: WeightStore, tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.publish("policy", 0, fail, {})
    assert os.listdir(tmp_path / "policy") == []
    assert store.latest("policy") is None


def test_prune_keeps_the_newest_the_pinned_and_the_latest(store: WeightStore, tmp_path: Path) -> None:
    publish(store, *range(6))
    (tmp_path / "policy" / "LATEST").write_text("1\n")
    assert store.prune("policy", keep=2, pinned=[0]) == [2, 3]
    assert store.versions("policy") == [0, 1, 4, 5]
    with pytest.raises(WeightMissingError):
        store.open("policy", 3)


def test_prune_clears_what_a_killed_writer_left_but_not_a_write_under_way(store: WeightStore, tmp_path: Path) -> None:
    publish(store, 0)
    abandoned = tmp_path / "policy" / ".00000001.deadbeef"
    abandoned.mkdir()
    (abandoned / "model.safetensors").write_bytes(b"half")
    (tmp_path / "policy" / ".LATEST.deadbeef").write_text("1")

    def write_while_pruning(directory: Path) -> None:
        writing(b"whole")(directory)
        store.prune("policy", keep=2)

    store.publish("policy", 2, write_while_pruning, {})
    assert sorted(os.listdir(tmp_path / "policy")) == ["00000000", "00000002", "LATEST"]
    assert (store.open("policy", 2) / "model.safetensors").read_bytes() == b"whole"


def test_a_writer_killed_in_the_middle_leaves_no_version(store: WeightStore, tmp_path: Path) -> None:
    publish(store, 0)
    script = (
        "import os, pathlib, signal, sys\n"
        "from jackpot.storage.weights import WeightStore\n"
        "def write(directory):\n"
        "    (directory / 'model.safetensors').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "WeightStore(pathlib.Path(sys.argv[1])).publish('policy', 1, write, {})\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=PATIENCE_SECONDS).returncode == -9
    latest = store.latest("policy")
    assert latest is not None and latest.version == 0
    assert store.versions("policy") == [0]
    store.prune("policy", keep=2)
    assert sorted(os.listdir(tmp_path / "policy")) == ["00000000", "LATEST"]


def test_readers_racing_with_publish_and_prune_see_whole_versions_or_a_missing_one(
    store: WeightStore, tmp_path: Path
) -> None:
    publish(store, 0)
    failures: list[Exception] = []
    read: list[int] = []
    done = threading.Event()

    def follow() -> None:
        reader = WeightStore(tmp_path)
        while not done.is_set():
            try:
                latest = reader.latest("policy")
                assert latest is not None
                read.append(int((reader.open("policy", latest.version) / "model.safetensors").read_bytes()[8:]))
            except (WeightMissingError, FileNotFoundError):
                continue  # pruned between looking and reading
            except Exception as error:
                failures.append(error)
                return

    readers = [threading.Thread(target=follow) for _ in range(2)]
    for thread in readers:
        thread.start()
    for version in range(1, 60):
        publish(store, version)
        store.prune("policy", keep=1)
    done.set()
    for thread in readers:
        thread.join(timeout=PATIENCE_SECONDS)
    assert failures == []
    assert read and all(0 <= version < 60 for version in read)
    assert store.versions("policy") == [59]


async def test_waiting_ends_when_the_version_is_published(store: WeightStore) -> None:
    publish(store, 0)
    waiting = asyncio.create_task(wait_for_version(store, "policy", 2, timeout_seconds=10, poll_seconds=0.005))
    await asyncio.to_thread(publish, store, 1)
    assert not waiting.done()
    await asyncio.to_thread(publish, store, 3)
    assert (await waiting).version == 3


async def test_waiting_in_vain_says_what_was_awaited_and_what_is_there(store: WeightStore) -> None:
    with pytest.raises(DeadlineError, match=r"0.01 s for version 0 of the actor's weights \(none is published\)"):
        await wait_for_version(store, "actor", 0, timeout_seconds=0.01, poll_seconds=0.005)
    publish(store, 4)
    with pytest.raises(DeadlineError, match=r"version 5 of the policy's weights \(the latest is 4\)"):
        await wait_for_version(store, "policy", 5, timeout_seconds=0.01, poll_seconds=0.005)


def test_the_manifest_is_plain_json(store: WeightStore, tmp_path: Path) -> None:
    publish(store, 1)
    content = json.loads((tmp_path / "policy" / "00000001" / "manifest.json").read_text())
    assert content["role"] == "policy"
    assert content["version"] == 1
    assert content["metadata"] == {"obrs_lambda": 1.0}
    assert content["files"]["model.safetensors"]["bytes"] == len(b"weights 1")
