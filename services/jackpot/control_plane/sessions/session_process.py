"""One session of a job under the control plane: a process of its own that outlives a restart of the control plane.

The process that runs the job writes its status into the run directory. A lock shows whether it is alive: the control
plane takes the lock before it starts the process and hands it over. No process ever runs without the lock, and no
process id can be mistaken for another's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from jackpot.errors import JackpotError
from jackpot.process.children import HASH_SEED
from jackpot.storage.json_files import read_record_if_whole, replace_json
from jackpot.storage.run_directory import LAUNCHER, RunFiles

Phase = Literal["preparing", "running", "finished"]


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """A session's own status."""

    session: int
    pid: int
    host: str
    phase: Phase
    state: str | None = None  # how it finished: succeeded, failed, stopped
    error: str | None = None

    def write(self, run_dir: Path) -> None:
        """Write it into the run directory."""
        replace_json(RunFiles(run_dir).session, asdict(self))

    @classmethod
    def read(cls, run_dir: Path, session: int) -> SessionStatus | None:
        """The last status of session number ``session``; None if there is none."""
        status = read_record_if_whole(RunFiles(run_dir).session, cls)
        return status if status is not None and status.session == session else None


class Session:
    """A session's process, which this control plane has started or found again after a restart."""

    def __init__(self, run_dir: Path, number: int, popen: subprocess.Popen[bytes] | None = None) -> None:
        self._run_dir = run_dir
        self._number = number
        self._popen = popen
        self._asked_at: float | None = None

    @classmethod
    def start(cls, run_dir: Path, number: int, variables: Mapping[str, str]) -> Session:
        """Start a session.

        Args:
            run_dir: the job's run directory.
            number: the session's, from 1.
            variables: added to our own environment.

        Raises:
            JackpotError: another session of this job still runs, or no process could be started.
        """
        lock = _lock(run_dir)
        if lock is None:
            raise JackpotError(f"a session of {run_dir.name} still runs")
        command = [sys.executable, "-m", "jackpot.control_plane.sessions.run_child", str(run_dir), str(number)]
        try:
            with RunFiles(run_dir).log(LAUNCHER).open("ab") as log:
                popen = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[lock],
                    env={**HASH_SEED, **os.environ, **variables},
                    start_new_session=True,
                )
        except OSError as error:
            raise JackpotError(f"no process could be started for {run_dir.name}: {error}") from error
        finally:
            os.close(lock)
        return cls(run_dir, number, popen)

    @property
    def status(self) -> SessionStatus | None:
        """The session's own status."""
        return SessionStatus.read(self._run_dir, self._number)

    @property
    def ours(self) -> bool:
        """Whether this process started it."""
        return self._popen is not None

    def alive(self) -> bool:
        """Whether its process runs."""
        if self._popen is not None and self._popen.poll() is not None:
            return False
        lock = _lock(self._run_dir)
        if lock is None:
            return True
        os.close(lock)
        return False

    def ask_to_stop(self, timeout_seconds: float) -> None:
        """SIGTERM the first time, SIGKILL once ``timeout_seconds`` have passed; call it until the session has ended.

        A session on another host that shares the run directory is asked through a file that it polls.
        """
        status = self.status
        if status is not None and status.host != socket.gethostname():
            RunFiles(self._run_dir).stop_request.touch()
            return
        if self._asked_at is None:
            if self._signal(signal.SIGTERM):
                self._asked_at = time.monotonic()
        elif time.monotonic() - self._asked_at > timeout_seconds:
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> bool:
        status = self.status
        pid = self._popen.pid if self._popen is not None else status.pid if status is not None else None
        if pid is None or not self.alive():
            return False
        # The process still holds the lock, so that its id cannot have been reused.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        return True


def _lock(run_dir: Path) -> int | None:
    try:
        descriptor = os.open(RunFiles(run_dir).session_lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        raise JackpotError(f"the run directory {run_dir} is gone") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
