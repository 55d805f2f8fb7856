"""Checkpoints of a job as Hugging Face directories, packed into a tar stream while it is sent.

A checkpoint itself serves to resume training, and has as many shards as there were processes. The model of its step
lies whole in the weight store, as the version of that number, which is kept as long as the checkpoint.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jackpot.control_plane.observing.archive_members import FileMember, Member, ObjectMember
from jackpot.errors import JobNotFoundError, ObjectMissingError
from jackpot.storage.job_storage import objects_of_run
from jackpot.storage.latest_checkpoint import LATEST, STEP_NAME, by_preference, read_latest
from jackpot.storage.object_directories import ObjectDirectories
from jackpot.storage.objects import Objects
from jackpot.storage.run_directory import CHECKPOINTS, WEIGHTS, RunFiles

EXPORT = "export"  # the name of the download, and part of the API
NAME_PATTERN = r"^(export|latest|[0-9]{8})$"
ROLES = ("policy", "actor")

# How long a download waits for an object store that is out of reach.
OUTAGE_SECONDS = 30.0

# Files of a Hugging Face directory besides the weights, taken from the model that training started from.
_COMPANIONS = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|merges\.txt|tokenizer\.model|chat_template\.(jinja|json)"
)


def checkpoints(run_dir: Path) -> list[dict[str, Any]]:
    """What can be downloaded: the checkpoints that are kept, oldest first, and the export if the job has one.

    ``latest`` marks the one from which training would resume.

    Raises:
        ObjectStoreError: they are in an object store, which refuses or is out of reach.
    """
    objects = objects_of_run(run_dir)
    downloads, named = _in_directory(run_dir) if objects is None else _in_store(objects)
    preferred = by_preference([checkpoint["name"] for checkpoint in downloads], named)[:1]
    for checkpoint in downloads:
        checkpoint["latest"] = checkpoint["name"] in preferred
    if RunFiles(run_dir).export.is_dir():
        downloads.append(_describe(run_dir, EXPORT, None) | {"latest": False})
    return [checkpoint for checkpoint in downloads if checkpoint["roles"]]


def _in_directory(run_dir: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The checkpoints, and the step that ``latest`` names."""
    directory = RunFiles(run_dir).checkpoints
    named = read_latest(directory)
    names = [path.name for path in directory.glob("*") if STEP_NAME.fullmatch(path.name)]
    return [_describe(run_dir, name, int(name)) for name in sorted(names)], named


def _in_store(objects: Objects) -> tuple[list[dict[str, Any]], str | None]:
    directories = ObjectDirectories(objects.below(CHECKPOINTS))
    named = directories.pointed(LATEST)
    whole = [directory for directory in directories.found() if STEP_NAME.fullmatch(directory.name)]
    sizes = {
        role: {directory.name: directory.bytes for directory in ObjectDirectories(objects.below(WEIGHTS, role)).found()}
        for role in (ROLES if whole else ())
    }
    described = [
        {
            "name": directory.name,
            "step": int(directory.name),
            "roles": {role: versions[directory.name] for role, versions in sizes.items() if directory.name in versions},
            "time": directory.modified,
        }
        for directory in whole
    ]
    return described, named


def _model(run_dir: Path, name: str, role: str) -> Path:
    """Where the weights of a role are, as of a checkpoint."""
    files = RunFiles(run_dir)
    return files.export / role if name == EXPORT else files.weights / role / name


def _describe(run_dir: Path, name: str, step: int | None) -> dict[str, Any]:
    files = RunFiles(run_dir)
    directory = files.export if name == EXPORT else files.checkpoints / name
    weights = {role: list(_model(run_dir, name, role).glob("model*.safetensors")) for role in ROLES}
    try:
        sizes = {role: sum(path.stat().st_size for path in paths) for role, paths in weights.items() if paths}
        modified = directory.stat().st_mtime
    except FileNotFoundError:  # pruned in between
        return {"name": name, "step": step, "roles": {}, "time": 0.0}
    return {"name": name, "step": step, "roles": sizes, "time": modified}


class Archive:
    """One model of one checkpoint, as a tar stream.

    Its files are open from the start, so that pruning cannot harm it. Objects in a store are read one after the other
    and checked; one that was pruned meanwhile, or is damaged, breaks the stream off.

    Args:
        run_dir: the run directory.
        name: of the checkpoint, as :func:`checkpoints` returns it; ``latest`` is the one marked so.
        role: ``policy`` or ``actor``.
        prefix: the directory inside the archive.

    Raises:
        JobNotFoundError: there is no such checkpoint, or not of this role.
        ObjectStoreError: it is in an object store, which refuses or is out of reach.
    """

    def __init__(self, run_dir: Path, name: str, role: str, prefix: str) -> None:
        self._prefix = prefix
        self._members = _members(run_dir, name, role)

    @property
    def size(self) -> int:
        """Bytes of the whole stream."""
        padded = sum(tarfile.BLOCKSIZE + _padded(member.size) for member in self._members)
        return padded + 2 * tarfile.BLOCKSIZE

    def chunks(self) -> Iterator[bytes]:
        """The stream; closes the files."""
        try:
            for member in self._members:
                info = tarfile.TarInfo(f"{self._prefix}/{member.name}")
                info.size, info.mtime, info.mode = member.size, member.modified, 0o644
                yield info.tobuf(tarfile.USTAR_FORMAT)
                yield from member.chunks()
                yield b"\0" * (_padded(member.size) - member.size)
            yield b"\0" * (2 * tarfile.BLOCKSIZE)
        finally:
            for member in self._members:
                member.close()


def _members(run_dir: Path, name: str, role: str) -> list[Member]:
    known = {checkpoint["name"]: checkpoint for checkpoint in checkpoints(run_dir)}
    if name == LATEST:
        name = next((known_name for known_name, description in known.items() if description["latest"]), name)
    if name not in known or role not in known[name]["roles"]:
        there = (
            ", ".join(f"{known_name} ({', '.join(description['roles'])})" for known_name, description in known.items())
            or "none yet"
        )
        raise JobNotFoundError(f"there is no checkpoint {name[:40]!r} of the {role[:40]!r}; there are: {there}")
    if name == EXPORT:
        return [FileMember(path) for path in sorted(_model(run_dir, name, role).iterdir()) if path.is_file()]
    model = Path(RunFiles(run_dir).job_settings("job")[role]["model"])
    members: list[Member] = [FileMember(path) for path in model.iterdir() if _COMPANIONS.fullmatch(path.name)]
    objects = objects_of_run(run_dir, OUTAGE_SECONDS)
    if objects is None:
        members += [FileMember(path) for path in _model(run_dir, name, role).glob("model*")]
    else:
        members += _stored(objects.below(WEIGHTS, role), name, int(known[name]["time"]))
    return sorted(members, key=lambda member: member.name)


def _stored(versions: Objects, name: str, modified: int) -> list[ObjectMember]:
    try:
        files = ObjectDirectories(versions).files(name)
    except ObjectMissingError:
        raise JobNotFoundError(f"checkpoint {name} was pruned just now; ask for the list again") from None
    return [ObjectMember(versions.below(name), key, file, modified) for key, file in files.items()]


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
