"""``manifest.json`` of a directory: its files with size and SHA-256, which reveal damage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jackpot.errors import DirectoryDamagedError
from jackpot.storage.weight_manifest import (
    MANIFEST,
    WeightFile,
    describe_file,
    files_as_json,
    files_from_json,
    mismatch,
)

# Hashing is bound by one core, and releases the interpreter lock.
_HASHED_AT_ONCE = 4


def describe_directory(directory: Path) -> dict[str, WeightFile]:
    """Every file of a directory by its relative path, subdirectories included, except the manifest itself."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)
    return _described(directory, [str(path.relative_to(directory)) for path in paths])


def manifest_of(files: Mapping[str, WeightFile]) -> bytes:
    """A manifest of exactly these files."""
    return (json.dumps({"files": files_as_json(files)}, indent=1) + "\n").encode()


def files_of(manifest: bytes, where: str) -> dict[str, WeightFile]:
    """The files that a manifest names.

    Args:
        manifest: its bytes.
        where: their source, for messages.

    Raises:
        DirectoryDamagedError: it cannot be read, or names files outside of the directory.
    """
    try:
        files = files_from_json(json.loads(manifest)["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DirectoryDamagedError(f"{where} cannot be read ({error!r})") from None
    if any(part in ("", ".", "..") for key in files for part in key.split("/")):
        raise DirectoryDamagedError(f"{where} names files outside of its directory")
    return files


def check_directory(directory: Path) -> None:
    """Check that a directory's files match its manifest, byte for byte.

    Raises:
        DirectoryDamagedError: naming the first file that differs or is missing.
        OSError: the disk cannot be read.
    """
    try:
        files = files_of((directory / MANIFEST).read_bytes(), str(directory / MANIFEST))
        described = _described(directory, list(files))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DirectoryDamagedError(f"{error.filename} is missing") from None
    for key, expected in files.items():
        if described[key] != expected:
            raise DirectoryDamagedError(mismatch(str(directory / key), described[key], expected))


def _described(directory: Path, keys: list[str]) -> dict[str, WeightFile]:
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        return dict(zip(keys, pool.map(lambda key: describe_file(directory / key), keys), strict=True))
