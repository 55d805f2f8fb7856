"""``latest``: a small file (or object) beside a job's checkpoints that names the one to resume from.

It is replaced atomically, after the new checkpoint is durable and before its groups are acknowledged on the bus. A kill
in between leaves a newer checkpoint that ``latest`` does not name, and whose groups are still on the bus.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jackpot.storage.durable_files import replace_synced

LATEST = "latest"
STEP_NAME = re.compile(r"[0-9]{8,}")
"""The name of a checkpoint's directory: its step, in eight digits."""


def read_latest(directory: Path) -> str | None:
    """The checkpoint named by ``latest`` in a directory, which need not exist; None without the file."""
    try:
        return (directory / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def write_latest(directory: Path, name: str) -> None:
    """Replace ``latest`` durably: written aside, synced, renamed."""
    replace_synced(directory / LATEST, f"{name}\n", directory / f".{LATEST}")


def by_preference(names: Sequence[str], latest: str | None) -> list[str]:
    """Checkpoints in the order in which to try them: the one that ``latest`` names, if it exists, then newest first."""
    return sorted(names, key=lambda name: (name == latest, int(name)), reverse=True)
