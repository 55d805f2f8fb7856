"""Child processes that end with their parent, however it ends. Linux only; a no-op elsewhere.

The kernel sends the signal when the *thread* that started a child ends: start children from a thread that stays alive.

A child is started as this file, run by a bare interpreter, which asks the kernel for the signal and then becomes the
command (execve keeps the process id, the open files and the request). ``preexec_fn`` would need no second
interpreter, but it forks Python: beside gRPC's threads such a child may abort before it reaches the command.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

HASH_SEED = {"PYTHONHASHSEED": "0"}
"""For the environment of every process of a job, unless the user sets it. Some tasks go through sets of strings, whose
order Python draws for each process: their prompts would differ between two runs of a seed. Not for the control plane,
which takes requests of strangers: the drawn order protects its dictionaries."""

_PR_SET_PDEATHSIG = 1
_CANNOT_EXECUTE = 127  # as in shells


def ending_with_us(command: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The command line that runs ``command`` as a child which gets SIGTERM when this process ends.

    This holds even if this process ends before the child has asked the kernel. The command starts some 30 ms later;
    one that cannot be executed ends with 127 and a line on stderr.

    Args:
        command: program and arguments; the program is looked up on PATH.
    """
    plain = [os.fspath(part) for part in command]
    if sys.platform != "linux":
        return plain
    # Isolated, without site-packages: fast, and unaffected by PYTHON* variables. The command still inherits them all.
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *plain]


def stop_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def _become(parent: int, command: list[str]) -> None:
    stop_with_parent()
    if os.getppid() != parent:
        sys.exit(1)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and execve keeps ignored signals ignored
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"error: {command[0]} cannot be executed: {error}", file=sys.stderr)
        sys.exit(_CANNOT_EXECUTE)


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
