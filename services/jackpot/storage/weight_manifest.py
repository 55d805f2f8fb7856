"""The manifest of a weight version: its files with size and hash, and metadata for readers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jackpot.errors import WeightCorruptError

MANIFEST = "manifest.json"
RESTORE = "The learner publishes intact versions: delete this one, or wait for the next."
"""The remedy for a damaged version."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One file of a version, with its expected size and hash."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """The manifest of one version."""

    role: str
    version: int
    files: Mapping[str, WeightFile]
    metadata: Mapping[str, Any]
    path: Path = field(compare=False)  # the version's directory


def describe_file(path: Path) -> WeightFile:
    """A file's actual size and hash."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return WeightFile(digest, os.fstat(file.fileno()).st_size)


def mismatch(where: str, actual: WeightFile, expected: WeightFile) -> str:
    """The message for a file that differs from its manifest."""
    return (
        f"{where} does not match its manifest ({actual.bytes} bytes, sha256 {actual.sha256[:12]}…, "
        f"expected {expected.bytes} bytes, sha256 {expected.sha256[:12]}…)"
    )


def files_as_json(files: Mapping[str, WeightFile]) -> dict[str, dict[str, str | int]]:
    """A manifest's entries for files, by name."""
    return {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in files.items()}


def files_from_json(content: Any) -> dict[str, WeightFile]:
    """The reverse of :func:`files_as_json`.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it has another form.
    """
    return {name: WeightFile(str(f["sha256"]), int(f["bytes"])) for name, f in content.items()}


def manifest_text(manifest: WeightManifest) -> str:
    """The manifest as JSON, which :func:`parse_manifest` reads back."""
    files, metadata = files_as_json(manifest.files), manifest.metadata
    content = {"role": manifest.role, "version": manifest.version, "files": files, "metadata": metadata}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def parse_manifest(text: str, role: str, version: int, directory: Path, where: str | None = None) -> WeightManifest:
    """The manifest of a version from its JSON.

    Args:
        text: the JSON.
        role: whose version it must be.
        version: the version it must be.
        directory: where the files are, or will be.
        where: the text's source, for messages; None is the directory.

    Raises:
        WeightCorruptError: it is not the manifest of this version.
    """
    where = where or str(directory / MANIFEST)
    try:
        content = json.loads(text)
        files = files_from_json(content["files"])
        named = (content["role"], content["version"])
        metadata = dict(content["metadata"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightCorruptError(f"{where} cannot be read ({error!r}). {RESTORE}") from None
    if named != (role, version) or any("/" in name or name.startswith(".") for name in files):
        raise WeightCorruptError(f"{where} does not describe version {version} of {role}. {RESTORE}")
    return WeightManifest(role, version, files, metadata, directory)
