"""``latest``: a small file beside a job's checkpoints, in an object store an object, that names the one to go on from.

It is replaced as a whole once the checkpoint that it is to name is there and durable, and before the bus is told that
its groups are trained. A kill in between leaves a newer checkpoint that it does not name, and whose groups are still on
the bus.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jackpot.storage.durable_files import replace_synced

LATEST = "latest"
STEP_NAME = re.compile(r"[0-9]{8,}")
"""How a checkpoint's directory is named: its step, in eight digits."""


def read_latest(directory: Path) -> str | None:
    """What ``latest`` in a directory says, whether there is such a checkpoint or not; None without the file."""
    try:
        return (directory / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def write_latest(directory: Path, name: str) -> None:
    """Replace ``latest`` durably: written aside, synced, renamed."""
    replace_synced(directory / LATEST, f"{name}\n", directory / f".{LATEST}")


def by_preference(names: Sequence[str], latest: str | None) -> list[str]:
    """Checkpoints in the order in which to go on from them: what ``latest`` says, if it is there, then the newest."""
    return sorted(names, key=lambda name: (name == latest, int(name)), reverse=True)
