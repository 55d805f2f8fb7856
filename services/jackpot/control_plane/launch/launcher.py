"""The launcher's interface: it brings a job's processes up, keeps them up, and takes them down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class LaunchStatus:
    """How a job's processes are doing."""

    finished: bool = False  # learner and orchestrator have done all their work
    waiting: bool = False  # in the queue for machines: nothing runs yet
    error: str | None = None  # why the job cannot go on
    restarts: Mapping[str, int] = field(default_factory=dict)  # by process


class Launcher(Protocol):
    """Runs the processes of one job."""

    @property
    def redis_url(self) -> str | None:
        """Where the job's bus is; None before it is started."""

    async def start(self) -> None:
        """Bring every process up. If it is cancelled, :meth:`stop` takes down what is up already.

        Raises:
            JackpotError: something could not be started.
        """

    async def scale(self, rollout_replicas: int) -> None:
        """Set the number of rollout replicas. Returns once that is requested, not once they are ready; repeating a
        request changes nothing.

        Raises:
            JackpotError: it cannot be requested just now; worth another attempt.
        """

    async def check(self) -> LaunchStatus:
        """Check the processes once and restart those that died; call it several times a second."""

    async def stop(self) -> None:
        """Take every process down within ten seconds; also if only some were started."""
