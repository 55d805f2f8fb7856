"""The directory of one run: where everything is, who holds it, what its files say so far."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jackpot.config import JobSpec, parse_job
from jackpot.errors import ConfigError, JackpotError

Row = dict[str, Any]

MAX_JOB_ID_LENGTH = 63


def new_job_id(name: str) -> str:
    """A job id: the job's name, the time, and a few random digits against two starts in one second.

    A long name is cut: an id has at most 63 characters, as a label in Kubernetes has.
    """
    suffix = f"-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return name[: MAX_JOB_ID_LENGTH - len(suffix)].rstrip("-") + suffix


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of a run, and readers of its files."""

    path: Path
    job_id: str

    @classmethod
    def create(cls, path: Path, job_id: str, job: JobSpec) -> RunDirectory:
        """Make a new run directory and write the job into it as resolved.

        Raises:
            ConfigError: the directory is there and not empty, or cannot be made.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise ConfigError(
                    "run directory", str(path), "is not empty", "Name another, or continue it with --resume."
                )
            (path / "logs").mkdir()
            (path / "job.json").write_text(job.model_dump_json(indent=2), encoding="utf-8")
            (path / "run.json").write_text(json.dumps({"job_id": job_id, "created": time.time()}), encoding="utf-8")
        except OSError as error:
            raise ConfigError("run directory", str(path), f"cannot be made ({error})", "Name another.") from None
        return cls(path.resolve(), job_id)

    @classmethod
    def open(cls, path: Path, field: str = "--resume") -> RunDirectory:
        """An existing run directory; ``field`` is what the path was given as.

        Raises:
            ConfigError: it is not one.
        """
        try:
            job_id = json.loads((path / "run.json").read_text(encoding="utf-8"))["job_id"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(
                field, str(path), "is not a run directory", "Give a directory that `jackpot run` made (runs/…)."
            ) from None
        return cls(path.resolve(), job_id)

    def load_job(self) -> JobSpec:
        """The job as resolved when the run was created.

        Raises:
            ConfigError: ``job.json`` is gone, damaged, or of a version that this one does not understand.
        """
        path = self.path / "job.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError("run directory", str(path), f"cannot be read ({error})", "Start a new run.") from None
        if not isinstance(content, dict):
            raise ConfigError("run directory", str(path), "does not hold a job", "Start a new run.")
        return parse_job(content)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run directory: two launchers on one run would each restart the other's processes.

        Raises:
            JackpotError: another launcher holds it.
        """
        descriptor = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise JackpotError(f"{self.path} is running already; stop that run first, or follow its logs") from None
        try:
            yield
        finally:
            os.close(descriptor)

    @property
    def steps(self) -> list[Row]:
        """Rows of ``metrics.jsonl`` by step; of a step written twice the last."""
        return _latest_rows(self.path / "metrics.jsonl")

    @property
    def evaluations(self) -> list[Row]:
        """Rows of ``evaluations.jsonl`` by step; of a step written twice the last."""
        return _latest_rows(self.path / "evaluations.jsonl")

    @property
    def activities(self) -> dict[str, Row]:
        """What each service of the last session spent its time on, as it wrote it: by service and replica."""
        records: dict[str, Row] = {}
        for path in sorted((self.path / "activity").glob("*.json")):
            with suppress(OSError, ValueError):
                records[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        return records

    @property
    def resumed_from_step(self) -> int | None:
        """The step that the learner last resumed from, if it ever did."""
        try:
            return int(json.loads((self.path / "resumed.json").read_text(encoding="utf-8"))["resumed_from_step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def summary(self) -> Row | None:
        """``summary.json`` of the last session, if there is one."""
        try:
            summary = json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return summary if isinstance(summary, dict) else None

    def log(self, process: str) -> Path:
        """The log of a process."""
        return self.path / "logs" / f"{process}.log"

    def last_lines(self, process: str) -> str:
        """The end of a process's log, for an error message."""
        return last_lines(self.log(process))


def last_lines(log: Path, count: int = 5) -> str:
    """The last ``error:`` line near the end of a log, or else its last lines."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    errors = [line for line in lines[-50:] if line.startswith("error:")]
    return "\n".join(errors[-1:] or lines[-count:])


def _latest_rows(path: Path) -> list[Row]:
    rows: dict[int, Row] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            continue  # the half line of a process killed while writing
    return [rows[step] for step in sorted(rows)]
