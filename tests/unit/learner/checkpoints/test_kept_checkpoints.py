"""``latest`` under kill -9 and over damaged files: what a learner goes on from, and what stays."""

from __future__ import annotations

import logging
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jackpot.errors import JackpotError
from jackpot.learner.checkpoints.kept_checkpoints import KeptCheckpoints

CONTENT = bytes(range(256)) * 64

# A process that adds one checkpoint and kills itself when it comes to a place in that.
CHILD = """
import os, shutil, signal, sys
from pathlib import Path
from jackpot.learner.checkpoints import kept_checkpoints
from jackpot.storage import latest_checkpoint

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

directory, name, place = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
kept = kept_checkpoints.KeptCheckpoints(directory, keep=2)
aside = directory / f".{name}"
kept.begin(aside)
(aside / "shard.safetensors").write_bytes(bytes(range(256)) * 64)
match place:
    case "written, not renamed":
        kept_checkpoints.sync_tree = die
    case "renamed, not named":
        kept_checkpoints.write_latest = die
    case "pointer written aside":
        Path.replace = die
    case "named, nothing pruned":
        kept_checkpoints.KeptCheckpoints._prune = die
    case "in the middle of pruning":
        remove = shutil.rmtree
        shutil.rmtree = lambda path, *rest, **more: (die if Path(path).exists() else remove)(path, *rest, **more)
kept.add(aside, name)
"""


def add(kept: KeptCheckpoints, directory: Path, step: int) -> None:
    aside = directory / f".{step:08d}"
    kept.begin(aside)
    (aside / "shard.safetensors").write_bytes(CONTENT)
    (aside / "state.json").write_text("{}")
    kept.add(aside, f"{step:08d}")


def names(directory: Path) -> list[str]:
    return sorted(path.name.lstrip("0") for path in directory.iterdir())


def killed_while_adding(directory: Path, step: int, place: str) -> None:
    command = [sys.executable, "-c", CHILD, str(directory), f"{step:08d}", place]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(
    ("place", "left", "latest"),
    [
        ("written, not renamed", ["2", "4", "latest"], "00000004"),
        ("renamed, not named", ["2", "4", "6", "latest"], "00000004"),
        ("pointer written aside", ["2", "4", "6", "latest"], "00000004"),
        ("named, nothing pruned", ["2", "4", "6", "latest"], "00000006"),
        ("in the middle of pruning", ["4", "6", "latest"], "00000006"),
    ],
)
def test_a_kill_at_any_place_leaves_a_whole_latest(tmp_path: Path, place: str, left: list[str], latest: str) -> None:
    before = KeptCheckpoints(tmp_path, keep=2)
    for step in (2, 4):
        add(before, tmp_path, step)
    killed_while_adding(tmp_path, 6, place)
    after = KeptCheckpoints(tmp_path, keep=2)
    assert names(tmp_path) == left
    assert after.latest() == tmp_path / latest
    add(after, tmp_path, 6)  # trained once more
    assert names(tmp_path) == ["4", "6", "latest"]
    assert (tmp_path / "latest").read_text() == "00000006\n"
    assert KeptCheckpoints(tmp_path, keep=2).latest() == tmp_path / "00000006"


def test_a_kill_before_the_first_pointer_leaves_the_newest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    killed_while_adding(tmp_path, 2, "renamed, not named")
    assert names(tmp_path) == ["2"]
    assert KeptCheckpoints(tmp_path, keep=2).latest() == tmp_path / "00000002"
    assert f"{tmp_path}/latest is missing; going on from the newest whole checkpoint" in caplog.text


def flip(path: Path) -> None:
    data = bytearray((path / "shard.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "shard.safetensors").write_bytes(data)


def cut(path: Path) -> None:
    (path / "shard.safetensors").write_bytes(CONTENT[:100])


def lose(path: Path) -> None:
    (path / "shard.safetensors").unlink()


def lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def spoil_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"files": [')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip, "shard.safetensors does not match its manifest"),
        (cut, r"shard.safetensors does not match its manifest \(100 bytes"),
        (lose, "shard.safetensors is missing"),
        (lose_manifest, "manifest.json is missing"),
        (spoil_manifest, "manifest.json cannot be read"),
    ],
)
def test_what_is_damaged_is_named_and_gives_way(
    tmp_path: Path, damage: Callable[[Path], None], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept = KeptCheckpoints(tmp_path, keep=3)
    for step in (2, 4, 6):
        add(kept, tmp_path, step)
    damage(tmp_path / "00000006")
    with caplog.at_level(logging.ERROR):
        assert kept.latest() == tmp_path / "00000004"
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"checkpoint {tmp_path}/00000006 is damaged, looking for an older one:")
    assert re.search(said, message)

    # It counts no longer: what is good stays in its place, also where its number is smaller.
    kept = KeptCheckpoints(tmp_path, keep=1)
    kept.latest()
    add(kept, tmp_path, 5)
    assert names(tmp_path) == ["5", "latest"] and kept.latest() == tmp_path / "00000005"


@pytest.mark.parametrize("text", ["00000008\n", "", "../../etc", "\xff\n"])
def test_a_pointer_to_nothing_is_told_and_the_newest_taken(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept = KeptCheckpoints(tmp_path, keep=2)
    for step in (2, 4):
        add(kept, tmp_path, step)
    (tmp_path / "latest").write_bytes(text.encode("latin-1"))
    assert kept.latest() == tmp_path / "00000004"
    assert "which is not there; going on from the newest whole checkpoint" in caplog.text


def test_the_pointer_may_be_moved_back_by_hand_and_its_checkpoint_stays_until_there_is_another(tmp_path: Path) -> None:
    kept = KeptCheckpoints(tmp_path, keep=2)
    for step in (2, 4):
        add(kept, tmp_path, step)
    (tmp_path / "latest").write_text("00000002\n")
    kept = KeptCheckpoints(tmp_path, keep=1)
    assert kept.latest() == tmp_path / "00000002"
    add(kept, tmp_path, 3)  # older than what was there: it is the latest, and stays
    assert names(tmp_path) == ["3", "4", "latest"] and kept.latest() == tmp_path / "00000003"


def test_where_nothing_is_intact_training_does_not_begin_anew(tmp_path: Path) -> None:
    kept = KeptCheckpoints(tmp_path, keep=2)
    assert kept.latest() is None
    for step in (2, 4):
        add(kept, tmp_path, step)
        cut(tmp_path / f"{step:08d}")
    with pytest.raises(
        JackpotError, match=r"all checkpoints in .* are damaged \(00000002, 00000004\).* start a new run"
    ):
        kept.latest()
    shutil.rmtree(tmp_path / "00000004")
    shutil.rmtree(tmp_path / "00000002")
    assert kept.latest() is None
