"""Directories for unix sockets: short, private, and gone when they are no longer needed."""

from __future__ import annotations

import json
import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from jackpot.control_plane.launch.socket_directory import (
    MAX_SOCKET_PATH_BYTES,
    close_socket_directory,
    open_socket_directory,
)


def test_it_is_private_recorded_and_takes_a_socket(tmp_path: Path) -> None:
    directory = open_socket_directory(tmp_path)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert json.loads((tmp_path / "sockets.json").read_text()) == {"directory": str(directory)}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "evaluator-9999.sock"))
    close_socket_directory(tmp_path)
    assert not directory.exists()


def test_what_a_killed_session_left_is_removed_by_the_next(tmp_path: Path) -> None:
    left = open_socket_directory(tmp_path)
    (left / "rollout-0.sock").touch()
    fresh = open_socket_directory(tmp_path)
    assert not left.exists() and list(fresh.iterdir()) == []
    close_socket_directory(tmp_path)


def test_where_temporary_files_lie_too_deep_for_a_socket_tmp_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 80)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    directory = open_socket_directory(tmp_path)
    assert directory.parent == Path("/tmp")
    assert len(os.fsencode(directory / "rollout-999.sock")) <= MAX_SOCKET_PATH_BYTES
    close_socket_directory(tmp_path)
    assert list(deep.iterdir()) == []


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"directory": 3}', '{"directory": "/nowhere/jackpot-x"}'])
def test_a_record_that_means_nothing_is_passed_over(tmp_path: Path, record: str) -> None:
    (tmp_path / "sockets.json").write_text(record)
    close_socket_directory(tmp_path)


def test_nothing_but_a_private_directory_of_ours_is_removed(tmp_path: Path) -> None:
    shared, other = tmp_path / "jackpot-shared", tmp_path / "thesis"
    shared.mkdir()
    shared.chmod(0o755)
    other.mkdir(mode=0o700)
    link = tmp_path / "jackpot-link"
    link.symlink_to(other)
    for directory in (shared, other, link):
        (tmp_path / "sockets.json").write_text(json.dumps({"directory": str(directory)}))
        close_socket_directory(tmp_path)
        assert directory.exists()
