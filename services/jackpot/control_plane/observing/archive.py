"""Checkpoints of a job as Hugging Face directories, packed into a tar stream while it is sent.

A checkpoint itself is for going on with training, in as many shards as there were processes. The model of its step lies
whole in the weight store, as the version of that number, which stays there as long as the checkpoint does.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jackpot.errors import JobNotFoundError

CHUNK_BYTES = 1 << 18
EXPORT = "export"
NAME_PATTERN = r"^(export|[0-9]{8})$"
ROLES = ("policy", "actor")

# What a Hugging Face directory holds beside the weights; taken from the model that training began with.
_COMPANIONS = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|merges\.txt|tokenizer\.model|chat_template\.(jinja|json)"
)


def checkpoints(run_dir: Path) -> list[dict[str, Any]]:
    """What can be downloaded: the checkpoints that are kept, oldest first, and the export if the job has one."""
    names = [path.name for path in (run_dir / "checkpoints").glob("*") if re.fullmatch(r"[0-9]{8}", path.name)]
    found = [_describe(run_dir, name, int(name)) for name in sorted(names)]
    if (run_dir / EXPORT).is_dir():
        found.append(_describe(run_dir, EXPORT, None))
    return [checkpoint for checkpoint in found if checkpoint["roles"]]


def _model(run_dir: Path, name: str, role: str) -> Path:
    """Where the weights of a role are, as of a checkpoint."""
    return run_dir / EXPORT / role if name == EXPORT else run_dir / "weights" / role / name


def _describe(run_dir: Path, name: str, step: int | None) -> dict[str, Any]:
    directory = run_dir / (EXPORT if name == EXPORT else f"checkpoints/{name}")
    weights = {role: list(_model(run_dir, name, role).glob("model*.safetensors")) for role in ROLES}
    try:
        sizes = {role: sum(path.stat().st_size for path in paths) for role, paths in weights.items() if paths}
        modified = directory.stat().st_mtime
    except FileNotFoundError:  # pruned at this moment
        return {"name": name, "step": step, "roles": {}, "time": 0.0}
    return {"name": name, "step": step, "roles": sizes, "time": modified}


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    file: BinaryIO
    size: int
    modified: int


class Archive:
    """One model of one checkpoint, as a tar stream. Its files are open from the start: pruning cannot harm it.

    Args:
        run_dir: the run directory.
        name: of the checkpoint, as :func:`checkpoints` tells it.
        role: ``policy`` or ``actor``.
        prefix: the directory inside the archive.

    Raises:
        JobNotFoundError: there is no such checkpoint, or not of this role.
    """

    def __init__(self, run_dir: Path, name: str, role: str, prefix: str) -> None:
        self._members = []
        for path in _files(run_dir, name, role):
            file = path.open("rb")
            status = os.fstat(file.fileno())
            self._members.append(_Member(f"{prefix}/{path.name}", file, status.st_size, int(status.st_mtime)))

    @property
    def size(self) -> int:
        """Bytes of the whole stream."""
        padded = sum(tarfile.BLOCKSIZE + _padded(member.size) for member in self._members)
        return padded + 2 * tarfile.BLOCKSIZE

    def chunks(self) -> Iterator[bytes]:
        """The stream; closes the files."""
        try:
            for member in self._members:
                info = tarfile.TarInfo(member.name)
                info.size, info.mtime, info.mode = member.size, member.modified, 0o644
                yield info.tobuf(tarfile.USTAR_FORMAT)
                left = member.size
                while left:
                    chunk = member.file.read(min(CHUNK_BYTES, left))
                    if not chunk:
                        raise OSError(f"{member.name} has shrunk while it was sent")
                    left -= len(chunk)
                    yield chunk
                yield b"\0" * (_padded(member.size) - member.size)
            yield b"\0" * (2 * tarfile.BLOCKSIZE)
        finally:
            for member in self._members:
                member.file.close()


def _files(run_dir: Path, name: str, role: str) -> list[Path]:
    known = {checkpoint["name"]: checkpoint["roles"] for checkpoint in checkpoints(run_dir)}
    if name not in known or role not in known[name]:
        there = ", ".join(f"{one} ({', '.join(roles)})" for one, roles in known.items()) or "none yet"
        raise JobNotFoundError(f"there is no checkpoint {name[:40]!r} of the {role[:40]!r}; there are: {there}")
    if name == EXPORT:
        return sorted(path for path in (run_dir / EXPORT / role).iterdir() if path.is_file())
    job = json.loads((run_dir / "job.json").read_text(encoding="utf-8"))
    model = Path(job[role]["model"])
    companions = [path for path in model.iterdir() if _COMPANIONS.fullmatch(path.name)]
    weights = _model(run_dir, name, role).glob("model*")
    return sorted([*companions, *weights])


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
