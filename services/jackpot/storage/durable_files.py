"""Writes files durably: they are on the disk when a call returns, and survive a crash of the machine."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Flush a directory and everything in it to the disk."""
    for path in [*directory.rglob("*"), directory]:
        sync(path)


def write_synced(path: Path, text: str) -> None:
    """Write a file, and flush its content to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_synced(path: Path, text: str, aside: Path) -> None:
    """Write ``aside`` and rename it to the file: readers find the old text or the new, even after a crash."""
    write_synced(aside, text)
    aside.replace(path)
    sync(path.parent)
