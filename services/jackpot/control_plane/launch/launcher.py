"""What a launcher does: it brings a job's processes up, keeps them up, and takes them down. Nobody else knows how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class LaunchStatus:
    """How a job's processes are doing."""

    finished: bool = False  # learner and orchestrator have done all their work
    waiting: bool = False  # for machines: nothing runs, and that is as it should be
    error: str | None = None  # the job cannot go on, and why
    restarts: Mapping[str, int] = field(default_factory=dict)  # by process


class Launcher(Protocol):
    """Runs the processes of one job."""

    @property
    def redis_url(self) -> str | None:
        """Where the job's bus is; None before it is started."""

    async def start(self) -> None:
        """Bring every process up. Cancelled, it leaves to :meth:`stop` what is up already.

        Raises:
            JackpotError: something could not be started.
        """

    async def scale(self, rollout_replicas: int) -> None:
        """Have the job's rollout replicas be this many. Returns when that is asked for, not when they are ready;
        asking again for the same changes nothing.

        Raises:
            JackpotError: it cannot be asked for just now; worth another attempt.
        """

    async def check(self) -> LaunchStatus:
        """Look after the processes once, restarting what died; call it several times a second."""

    async def stop(self) -> None:
        """Take every process down within ten seconds; also if only some were started."""
