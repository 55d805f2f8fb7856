"""The states of a job and every transition between them. No other module decides what may follow what."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from jackpot.errors import JobStateError


class JobState(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"  # waits for a slot
    STARTING = "starting"  # has a slot; models are prepared, processes come up
    RUNNING = "running"  # its processes are up
    STOPPING = "stopping"  # was cancelled; its processes finish their unit of work
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def active(self) -> bool:
        """Whether the job holds a slot."""
        return self in (JobState.STARTING, JobState.RUNNING, JobState.STOPPING)

    @property
    def finished(self) -> bool:
        """Whether the job has ended; only a request can move it again."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.STARTING, JobState.CANCELLED, JobState.FAILED}),
    # Back to queued: the job's processes were lost, and policy resumes it. Straight to succeeded: the job was so short
    # that it ended before the scheduler looked, or while the control plane was down.
    JobState.STARTING: frozenset(
        {JobState.RUNNING, JobState.STOPPING, JobState.QUEUED, JobState.SUCCEEDED, JobState.FAILED}
    ),
    JobState.RUNNING: frozenset({JobState.STOPPING, JobState.QUEUED, JobState.SUCCEEDED, JobState.FAILED}),
    # A job may finish while it is being stopped.
    JobState.STOPPING: frozenset({JobState.CANCELLED, JobState.SUCCEEDED, JobState.FAILED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.CANCELLED: frozenset({JobState.QUEUED}),
}
"""What may follow each state."""


def check_transition(job_id: str, before: JobState, after: JobState) -> None:
    """Refuse a transition that the table does not allow.

    Raises:
        JobStateError: naming the job's state and what may follow it.
    """
    if after not in TRANSITIONS[before]:
        possible = ", ".join(sorted(TRANSITIONS[before])) or "nothing"
        raise JobStateError(f"{job_id} is {before} and cannot become {after}; what may follow is: {possible}")
