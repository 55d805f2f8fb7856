"""Where a job's weights and checkpoints are: its run directory, or an object store."""

from __future__ import annotations

from pathlib import Path

from jackpot.config import JobSpec
from jackpot.runtime.object_directories import ObjectDirectories
from jackpot.runtime.object_weights import ObjectWeightStore
from jackpot.runtime.objects import Objects
from jackpot.runtime.weights import WeightStore


def job_objects(job: JobSpec, job_id: str) -> Objects | None:
    """The job's part of its object store; None if it keeps everything in the run directory.

    Raises:
        ConfigError: the client for object stores is not installed, or its variables cannot be.
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
        copies: directory for this process's copies of what an object store holds.

    Raises:
        ConfigError: as :func:`job_objects`.
    """
    objects = job_objects(job, job_id)
    return WeightStore(run_dir / "weights") if objects is None else ObjectWeightStore(objects.below("weights"), copies)


def stored_checkpoints(job: JobSpec, job_id: str) -> ObjectDirectories | None:
    """The job's checkpoints in its object store, named by step in eight digits; None if it has none.

    Raises:
        ConfigError: as :func:`job_objects`.
    """
    objects = job_objects(job, job_id)
    return None if objects is None else ObjectDirectories(objects.below("checkpoints"))
