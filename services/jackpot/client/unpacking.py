"""Unpacks a pulled checkpoint into a directory."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jackpot.errors import ApiError


def unpack(chunks: Iterator[bytes], directory: Path) -> Path:
    """Unpack an archive beside ``directory`` and rename the result, so that ``directory`` is always complete."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        archive = aside / "archive.tar"
        with archive.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
        with tarfile.open(archive, "r:") as tar:
            tar.extractall(aside / "content", filter="data")
        (inner,) = (aside / "content").iterdir()
        inner.rename(directory)
    except (tarfile.TarError, ValueError) as error:
        raise ApiError(f"the archive cannot be unpacked ({error}); try again") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return directory
