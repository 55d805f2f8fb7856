"""How many rollout replicas a running job should have, and where those that there are can be reached.

Both are files in the run directory, which every process of a job shares: ``scale.json`` holds the number wanted, and
each replica that joins writes ``rollouts/<instance>.json``. A process that comes back after a crash finds them as they
were.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from jackpot.errors import ConfigError

WANTED_FILE = "scale.json"
ANNOUNCEMENTS = "rollouts"

MAX_ROLLOUT_REPLICAS = 1024
"""More would be a slip: the orchestrator keeps a connection to each."""


def set_wanted_replicas(run_dir: Path, replicas: int) -> None:
    """Write down how many rollout replicas a job should have from now on.

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
    _write(run_dir / WANTED_FILE, {"rollout_replicas": replicas})


def wanted_replicas(run_dir: Path) -> int | None:
    """How many rollout replicas the job should have; None where nobody has asked for other than the job file does."""
    try:
        wanted = json.loads((run_dir / WANTED_FILE).read_text(encoding="utf-8"))["rollout_replicas"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return wanted if isinstance(wanted, int) and 1 <= wanted <= MAX_ROLLOUT_REPLICAS else None


def announce_rollout(run_dir: Path, instance: str, address: str) -> None:
    """Write down where a rollout replica is reached.

    Args:
        run_dir: of the job.
        instance: the replica's number among its like.
        address: gRPC address, as others see it.

    Raises:
        OSError: the file cannot be written.
    """
    directory = run_dir / ANNOUNCEMENTS
    directory.mkdir(exist_ok=True)
    _write(directory / f"{instance}.json", {"address": address})


def withdraw_rollout(run_dir: Path, instance: str) -> None:
    """Take back what :func:`announce_rollout` wrote, if it did."""
    (run_dir / ANNOUNCEMENTS / f"{instance}.json").unlink(missing_ok=True)


def announced_rollouts(run_dir: Path) -> dict[int, str]:
    """Addresses of the replicas that have announced themselves, by instance."""
    found: dict[int, str] = {}
    for path in (run_dir / ANNOUNCEMENTS).glob("[0-9]*.json"):
        try:
            found[int(path.stem)] = str(json.loads(path.read_text(encoding="utf-8"))["address"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # withdrawn just now
    return found


def forget_rollouts(run_dir: Path) -> None:
    """Remove what replicas of an earlier session have announced. The number wanted stays."""
    shutil.rmtree(run_dir / ANNOUNCEMENTS, ignore_errors=True)


def _write(path: Path, content: object) -> None:
    # Aside and renamed: whoever reads meanwhile reads the one or the other.
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content), encoding="utf-8")
    aside.replace(path)
