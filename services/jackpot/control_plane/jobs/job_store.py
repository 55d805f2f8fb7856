"""Where jobs are kept. Once a method returns, its effect survives a kill of the control plane and of the store."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jackpot.control_plane.jobs.records import JobRecord, Transition
from jackpot.control_plane.jobs.states import JobState


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """Identifies a repeated request: the caller, the key it chose, and what it asked for."""

    owner: str
    key: str
    fingerprint: str  # of the request; the same key with another digest is an error


@dataclass(frozen=True, slots=True)
class JobPage:
    """A page of a list: records as stored (JSON), by id, newest first."""

    records: Mapping[str, bytes]
    next_cursor: int | None  # where the next page begins; None if this is the last


class JobStore(Protocol):
    """Holds jobs."""

    async def create(
        self, record: JobRecord, spec: bytes, idempotency: IdempotencyKey | None = None
    ) -> tuple[JobRecord, bool]:
        """Store a new job, queued.

        Returns:
            The job of this idempotency key, and whether it is new.

        Raises:
            IdempotencyError: the key was used for another request.
        """
        ...

    async def get(self, job_id: str) -> JobRecord:
        """A job.

        Raises:
            JobNotFoundError: there is none.
        """
        ...

    async def spec(self, job_id: str) -> bytes:
        """The job file of a job, as JSON.

        Raises:
            JobNotFoundError: there is none.
        """
        ...

    async def page(
        self, states: Collection[JobState], labels: Mapping[str, str], cursor: int | None, limit: int
    ) -> JobPage:
        """Jobs from ``cursor`` on, newest first: in one of the states (none means any) and with all labels."""
        ...

    async def in_states(self, *states: JobState) -> list[JobRecord]:
        """All jobs in one of the states, oldest first. Meant for states that few jobs are in."""
        ...

    async def queue(self, count: int) -> list[JobRecord]:
        """The first of the queue: by priority, then by age."""
        ...

    async def transition(self, job_id: str, state: JobState, reason: str, **changes: Any) -> JobRecord:
        """Move a job to another state, and change other fields of its record in the same step.

        Raises:
            JobNotFoundError: there is no such job.
            JobStateError: the table of transitions does not allow it.
        """
        ...

    async def transitions(self, job_id: str, start: int = 0) -> list[Transition]:
        """The changes of a job's state from the ``start``-th on, oldest first."""
        ...

    async def delete(self, job_id: str) -> None:
        """Forget a finished job.

        Raises:
            JobNotFoundError: there is no such job.
            JobStateError: it has not finished.
        """
        ...

    async def counts(self) -> dict[JobState, int]:
        """How many jobs are in each state."""
        ...

    async def lead(self, server: str, seconds: float) -> bool:
        """Take or keep the lead among the servers on this store for ``seconds``; 0 gives it up.

        Args:
            server: the caller's name, unique among the servers.
            seconds: how long the lead lasts unless it is taken again.

        Returns:
            Whether ``server`` leads now.
        """
        ...

    async def ping(self) -> None:
        """Check that the store answers.

        Raises:
            BusError: it does not.
        """
        ...
