"""Where a job's weights and checkpoints are: its run directory, or an object store."""

from __future__ import annotations

from pathlib import Path

from jackpot.config import JobSpec
from jackpot.storage.json_files import read_object
from jackpot.storage.object_directories import ObjectDirectories
from jackpot.storage.object_weights import ObjectWeightStore
from jackpot.storage.objects import Objects
from jackpot.storage.run_directory import CHECKPOINTS, PAYLOADS, WEIGHTS, RunFiles
from jackpot.storage.weights import WeightStore


def job_objects(job: JobSpec, job_id: str) -> Objects | None:
    """The job's part of its object store; None if it keeps everything in the run directory.

    Raises:
        ConfigError: the client for object stores is not installed, or its variables are not valid.
    """
    if job.weights.store is None:
        return None
    return Objects(f"{job.weights.store}/{job_id}", job.weights.outage_seconds)


def open_weight_store(job: JobSpec, job_id: str, run_dir: Path, copies: Path) -> WeightStore:
    """The job's weight store.

    Args:
        job: the job as resolved.
        job_id: its id.
        run_dir: its run directory.
        copies: directory for this process's copies of objects in an object store.

    Raises:
        ConfigError: as :func:`job_objects`.
    """
    return _weight_store(job_objects(job, job_id), run_dir, copies)


def weight_store_of_run(run_dir: Path, copies: Path) -> WeightStore:
    """As :func:`open_weight_store`, for a run of which only the directory is known."""
    return _weight_store(objects_of_run(run_dir, outage_seconds=30.0), run_dir, copies)


def _weight_store(objects: Objects | None, run_dir: Path, copies: Path) -> WeightStore:
    return (
        WeightStore(RunFiles(run_dir).weights) if objects is None else ObjectWeightStore(objects.below(WEIGHTS), copies)
    )


def stored_checkpoints(job: JobSpec, job_id: str) -> ObjectDirectories | None:
    """The job's checkpoints in its object store, named by step in eight digits; None if it has none.

    Raises:
        ConfigError: as :func:`job_objects`.
    """
    objects = job_objects(job, job_id)
    return None if objects is None else ObjectDirectories(objects.below(CHECKPOINTS))


def payload_place(job: JobSpec, job_id: str, run_dir: Path) -> Path | Objects:
    """Where the job's payloads lie while they are on the bus, if not in the bus's own server.

    Raises:
        ConfigError: as :func:`job_objects`.
    """
    objects = job_objects(job, job_id) if job.bus.payload_store == "s3" else None
    return RunFiles(run_dir).payloads if objects is None else objects.below(PAYLOADS)


def objects_of_run(run_dir: Path, outage_seconds: float = 0.0) -> Objects | None:
    """The part of an object store that belongs to a run; None if its directory holds everything, or it has not begun.

    Args:
        run_dir: the run directory.
        outage_seconds: how long a call is retried while the store is out of reach.

    Raises:
        ConfigError: the client for object stores is not installed, or its variables are not valid.
        DamagedRecordError: a file that names the objects' location cannot be read.
    """
    files = RunFiles(run_dir)
    try:
        # Not parsed, so that the objects of a job from an older version can still be found.
        store = read_object(files.job).get("weights", {}).get("store")
        if store is None:
            return None
        job_id = files.job_id()
    except FileNotFoundError:
        return None
    return Objects(f"{store}/{job_id}", outage_seconds)
