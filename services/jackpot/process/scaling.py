"""How many rollout replicas a running job should have, and the addresses of those that joined.

Both are files in the run directory, which every process of a job shares: ``scale.json`` holds the number wanted, and
each replica that joins writes ``rollouts/<instance>.json``. A restarted process finds both.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from jackpot.errors import ConfigError
from jackpot.storage.json_files import read_object_if_whole, read_record_if_whole, replace_json, warn_once
from jackpot.storage.run_directory import RunFiles

MAX_ROLLOUT_REPLICAS = 1024
"""A larger number is likely a typo: the orchestrator keeps a connection to each replica."""


@dataclass(frozen=True, slots=True)
class _Announcement:
    address: str


def set_wanted_replicas(run_dir: Path, replicas: int) -> None:
    """Record how many rollout replicas a job should have from now on.

    Args:
        run_dir: of the job.
        replicas: from 1 to :data:`MAX_ROLLOUT_REPLICAS`.

    Raises:
        ConfigError: the number is out of bounds.
        OSError: the file cannot be written.
    """
    if not 1 <= replicas <= MAX_ROLLOUT_REPLICAS:
        raise ConfigError(
            "rollout_replicas",
            replicas,
            f"is not between 1 and {MAX_ROLLOUT_REPLICAS}",
            "Cancel the job instead to stop sampling." if replicas < 1 else "Ask for fewer.",
        )
    replace_json(RunFiles(run_dir).scale, {"rollout_replicas": replicas})


def wanted_replicas(run_dir: Path) -> int | None:
    """How many rollout replicas the job should have; None if only the job file sets the number."""
    path = RunFiles(run_dir).scale
    content = read_object_if_whole(path)
    if content is None:
        return None
    wanted = content.get("rollout_replicas")
    if not isinstance(wanted, int) or not 1 <= wanted <= MAX_ROLLOUT_REPLICAS:
        warn_once(f"{path} is damaged: rollout_replicas = {wanted!r}; using the job file's number")
        return None
    return wanted


def announce_rollout(run_dir: Path, instance: str, address: str) -> None:
    """Record the address of a rollout replica.

    Args:
        run_dir: of the job.
        instance: the replica's number.
        address: its gRPC address for other processes.

    Raises:
        OSError: the file cannot be written.
    """
    directory = RunFiles(run_dir).rollouts
    directory.mkdir(exist_ok=True)
    replace_json(directory / f"{instance}.json", asdict(_Announcement(address)))


def withdraw_rollout(run_dir: Path, instance: str) -> None:
    """Remove the file of :func:`announce_rollout`, if there is one."""
    (RunFiles(run_dir).rollouts / f"{instance}.json").unlink(missing_ok=True)


def announced_rollouts(run_dir: Path) -> dict[int, str]:
    """Addresses of the replicas that have announced themselves, by instance."""
    addresses: dict[int, str] = {}
    for path in RunFiles(run_dir).rollouts.glob("[0-9]*.json"):
        announcement = read_record_if_whole(path, _Announcement)  # it may have just been withdrawn
        if announcement is not None:
            addresses[int(path.stem)] = announcement.address
    return addresses


def forget_rollouts(run_dir: Path) -> None:
    """Remove the addresses of an earlier session's replicas. The number wanted stays."""
    shutil.rmtree(RunFiles(run_dir).rollouts, ignore_errors=True)
