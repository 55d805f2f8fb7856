"""The directory of one run: the name of every file in it, its lock, and its job's reader and writer.

No other module spells these names. :mod:`jackpot.storage.run_records` has the files' contents.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jackpot.config import JobSpec, parse_job
from jackpot.config.environment import PREFIX, ServiceEnvironment
from jackpot.errors import ConfigError, DamagedRecordError, JackpotError
from jackpot.storage.json_files import Row, read_object, replace_json

MAX_JOB_ID_LENGTH = 63

# The same names are used in an object store.
WEIGHTS = "weights"
CHECKPOINTS = "checkpoints"
PAYLOADS = "payloads"

LAUNCHER = "launcher"
"""The process that runs a job under the control plane, by the name of its log."""


class _Entry:
    """A file or directory of the run directory, as a path."""

    def __init__(self, name: str, written_by: str) -> None:
        self.name = name
        self.written_by = written_by

    def __get__(self, files: RunFiles, owner: type) -> Path:
        return files.root / self.name


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The paths of a run directory. Each writer creates its directories.

    Args:
        root: the run directory.
    """

    root: Path

    job = _Entry("job.json", "launcher")
    """The job as resolved."""
    identity = _Entry("run.json", "launcher")
    """Job id and time of creation; written last, so that without it the rest may be incomplete."""
    metrics = _Entry("metrics.jsonl", "learner")
    """A row per optimizer step. After a restart a step may appear again: the last row counts."""
    resumed = _Entry("resumed.json", "learner")
    """The step that training last resumed from."""
    alarms = _Entry("alarms.jsonl", "learner")
    evaluations = _Entry("evaluations.jsonl", "orchestrator")
    reward_failures = _Entry("reward_failures.jsonl", "orchestrator")
    ledger = _Entry("ledger.jsonl", "orchestrator")
    """How every group ended."""
    manifests = _Entry("manifests", "learner")
    """The groups of each batch, written before it trains."""
    checkpoints = _Entry(CHECKPOINTS, "learner")
    weights = _Entry(WEIGHTS, "learner")
    """Published versions, ``<role>/<version>/``."""
    export = _Entry("export", "learner")
    """Both models in Hugging Face format."""
    profile = _Entry("profile", "learner")
    trajectories = _Entry("trajectories", "learner")
    """Scored groups of the last batches, if ``run.keep_trajectories`` is set."""
    payloads = _Entry(PAYLOADS, "bus")
    """Groups while they are on the bus, if ``bus.payload_store`` is ``file``."""
    bus_server = _Entry("redis", "launcher")
    """The data of the embedded server."""
    scratch = _Entry("scratch", "every service")
    """Copies of objects in an object store; may be lost at any time."""
    activities = _Entry("activity", "every service")
    """What each process spent its time on."""
    metrics_addresses = _Entry("metrics", "every service")
    """Where each process serves /metrics, in Prometheus's service discovery format."""
    rollouts = _Entry("rollouts", "rollout")
    """Addresses of the rollout replicas that joined later."""
    scale = _Entry("scale.json", "control plane")
    """How many rollout replicas are wanted."""
    scalings = _Entry("scalings.jsonl", "launcher")
    """Each change of that number."""
    sockets = _Entry("sockets.json", "launcher")
    """Where the session's unix sockets are."""
    session = _Entry("session.json", "launcher")
    """The status of the session under the control plane."""
    telemetry = _Entry("telemetry.jsonl", "launcher")
    """Queue depths and throughput, one row a second."""
    samples = _Entry("samples.jsonl", "launcher")
    """Sample trajectories."""
    tensorboard = _Entry("tensorboard", "launcher")
    wandb = _Entry("wandb", "launcher")
    """Made by the client of Weights & Biases."""
    trackers = _Entry("trackers.json", "launcher")
    """The last rows passed to the trackers."""
    logs = _Entry("logs", "launcher")
    """One file per process."""
    summary = _Entry("summary.json", "launcher")
    """The outcome."""
    curves = _Entry("curves.png", "launcher")
    lock = _Entry(".lock", "launcher")
    session_lock = _Entry(".session.lock", "control plane")
    stop_request = _Entry(".stop", "control plane")
    """Asks a session on another host to stop."""

    def log(self, process: str) -> Path:
        """The log of a process."""
        return self.logs / f"{process}.log"

    def load_job(self, field: str) -> JobSpec:
        """The job as resolved by the launcher.

        Args:
            field: the setting that names the run directory, for errors.

        Raises:
            ConfigError: there is no such file, it is damaged, or it has an unknown version.
        """
        return parse_job(self.job_settings(field))

    def job_settings(self, field: str) -> Row:
        """The job as JSON, not yet parsed: for fields read in any version, or changed before parsing.

        Raises:
            ConfigError: there is no such file, or it is damaged.
        """
        try:
            return read_object(self.job)
        except FileNotFoundError:
            problem = f"has no {self.job.name}"
        except DamagedRecordError as error:
            problem = f"{self.job.name} cannot be read ({error.why})"
        raise ConfigError(field, str(self.root), problem, "Give a directory that `jackpot run` made (runs/…).")

    def write_job(self, job: JobSpec) -> None:
        """Write or replace the job.

        Raises:
            OSError: the disk is full or gone.
        """
        replace_json(self.job, job.model_dump(mode="json"), indent=2)

    def job_id(self) -> str:
        """The run's job id.

        Raises:
            FileNotFoundError: this is not a run directory.
            DamagedRecordError: the file that holds it cannot be read.
        """
        job_id = read_object(self.identity).get("job_id")
        if not isinstance(job_id, str):
            raise DamagedRecordError(self.identity, None, "it holds no job_id")
        return job_id


def load_service_job(environment: ServiceEnvironment) -> JobSpec:
    """The job of a service, from its run directory.

    Raises:
        ConfigError: as :meth:`RunFiles.load_job`.
    """
    return RunFiles(environment.run_dir).load_job(f"{PREFIX}RUN_DIR")


def scratch_directory(environment: ServiceEnvironment) -> Path:
    """Where a job's processes on this machine keep copies of objects in an object store."""
    if environment.scratch_dir:
        return Path(environment.scratch_dir) / environment.job_id
    return RunFiles(environment.run_dir).scratch


def new_job_id(name: str) -> str:
    """A job id: the job's name, the time, and a few random digits in case two jobs start in one second.

    A long name is cut: an id has at most 63 characters, like a Kubernetes label.
    """
    suffix = f"-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return name[: MAX_JOB_ID_LENGTH - len(suffix)].rstrip("-") + suffix


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """An existing run directory with its job id, for its launcher and for observers of the run."""

    path: Path
    job_id: str

    @classmethod
    def create(cls, path: Path, job_id: str, job: JobSpec) -> RunDirectory:
        """Create a run directory and write the job into it as resolved.

        Raises:
            ConfigError: the directory exists and is not empty, or cannot be created.
        """
        files = RunFiles(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise ConfigError(
                    "run directory", str(path), "is not empty", "Name another, or continue it with --resume."
                )
            files.logs.mkdir()
            files.write_job(job)
            replace_json(files.identity, {"job_id": job_id, "created": time.time()})
        except OSError as error:
            raise ConfigError("run directory", str(path), f"cannot be created ({error})", "Name another.") from None
        return cls(path.resolve(), job_id)

    @classmethod
    def open(cls, path: Path, field: str = "--resume") -> RunDirectory:
        """An existing run directory; ``field`` is the setting that names it.

        Raises:
            ConfigError: it is not a run directory.
        """
        try:
            job_id = RunFiles(path).job_id()
        except (OSError, DamagedRecordError) as error:
            raise ConfigError(
                field,
                str(path),
                f"is not a run directory ({error})",
                "Give a directory that `jackpot run` made (runs/…).",
            ) from None
        return cls(path.resolve(), job_id)

    @property
    def files(self) -> RunFiles:
        """Its paths."""
        return RunFiles(self.path)

    def load_job(self) -> JobSpec:
        """The job as resolved when the run was created.

        Raises:
            ConfigError: as :meth:`RunFiles.load_job`.
        """
        return self.files.load_job("run directory")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run directory: two launchers of one run would each restart the other's processes.

        Raises:
            JackpotError: another launcher holds it.
        """
        descriptor = os.open(self.files.lock, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise JackpotError(f"{self.path} is running already; stop that run first, or follow its logs") from None
        try:
            yield
        finally:
            os.close(descriptor)

    def log(self, process: str) -> Path:
        """The log of a process."""
        return self.files.log(process)

    def last_lines(self, process: str) -> str:
        """The end of a process's log, for an error message."""
        return last_lines(self.log(process))


def last_lines(log: Path, count: int = 5) -> str:
    """The last ``error:`` line near the end of a log, else its last lines."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    errors = [line for line in lines[-50:] if line.startswith("error:")]
    return "\n".join(errors[-1:] or lines[-count:])
