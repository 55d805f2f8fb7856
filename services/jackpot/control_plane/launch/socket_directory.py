"""Where a run's unix sockets lie: a private directory whose path is short enough for a socket.

Run directories may lie anywhere, and the kernel limits a socket's path to 104 to 108 bytes.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from jackpot.storage.json_files import read_record_if_whole, replace_json
from jackpot.storage.run_directory import RunFiles

MAX_SOCKET_PATH_BYTES = 100
_LONGEST_NAME = "/evaluator-9999.sock"


@dataclass(frozen=True, slots=True)
class _SocketDirectory:
    directory: str


def open_socket_directory(run_dir: Path) -> Path:
    """A directory for a session's sockets, recorded in the run directory.

    The directory of a killed session is removed, so that they do not pile up.

    Raises:
        OSError: it cannot be created.
    """
    close_socket_directory(run_dir)
    directory = Path(tempfile.mkdtemp(prefix="jackpot-", dir=_short_base()))
    replace_json(RunFiles(run_dir).sockets, asdict(_SocketDirectory(str(directory))))
    return directory


def close_socket_directory(run_dir: Path) -> None:
    """Remove the recorded directory, if it is one that only this user can have made."""
    record = read_record_if_whole(RunFiles(run_dir).sockets, _SocketDirectory)
    if record is None:
        return
    directory = Path(record.directory)
    try:
        status = directory.lstat()
    except (OSError, ValueError):
        return
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    if private and directory.name.startswith("jackpot-"):
        shutil.rmtree(directory, ignore_errors=True)


def _short_base() -> str:
    base = tempfile.gettempdir()
    longest = len(os.fsencode(base)) + len("/jackpot-12345678") + len(_LONGEST_NAME)
    return base if longest <= MAX_SOCKET_PATH_BYTES else "/tmp"
