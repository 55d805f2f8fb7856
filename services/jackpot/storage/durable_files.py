"""Files that are on the disk when a call returns, whatever happens to the machine then."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Have a file, or the entries of a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Have a directory and all that is in it on the disk."""
    for path in [*directory.rglob("*"), directory]:
        sync(path)


def write_synced(path: Path, text: str) -> None:
    """Write a file, and have its content on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_synced(path: Path, text: str, aside: Path) -> None:
    """Replace a file by ``aside``, written first: readers and a crash find the old text or the new one, whole."""
    write_synced(aside, text)
    aside.replace(path)
    sync(path.parent)
