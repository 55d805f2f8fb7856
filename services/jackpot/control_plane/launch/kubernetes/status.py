"""What a JobSet's status means for its job: one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Phase(StrEnum):
    """Where a JobSet stands."""

    WAITING = "waiting"  # suspended: Kueue has not admitted it, or has preempted it
    STARTING = "starting"  # pods are being placed, images pulled, models loaded
    RUNNING = "running"  # the learner's and the orchestrator's pods run
    COMPLETED = "completed"
    FAILED = "failed"


# The first condition that is true decides; a JobSet with none of them starts or runs.
_BY_CONDITION = (
    ("Failed", Phase.FAILED),
    ("Completed", Phase.COMPLETED),
    ("Suspended", Phase.WAITING),
)
_DECISIVE = ("learner", "orchestrator")


@dataclass(frozen=True, slots=True)
class Status:
    """A JobSet's status, read."""

    phase: Phase
    message: str = ""  # why it failed

    @classmethod
    def of(cls, jobset: Mapping[str, Any]) -> Status:
        """Read a JobSet as the API server returns it."""
        status = jobset.get("status") or {}
        conditions = {each["type"]: each for each in status.get("conditions") or () if each.get("status") == "True"}
        for name, phase in _BY_CONDITION:
            if name in conditions:
                condition = conditions[name]
                told = ": ".join(filter(None, (condition.get("reason"), condition.get("message"))))
                return cls(phase, told if phase is Phase.FAILED else "")
        if (jobset.get("spec") or {}).get("suspend") and not status.get("replicatedJobsStatus"):
            return cls(Phase.WAITING)
        roles = {role["name"]: role for role in status.get("replicatedJobsStatus") or ()}
        up = any(roles.get(role, {}).get("ready", 0) for role in _DECISIVE) or any(
            roles.get(role, {}).get("succeeded", 0) for role in _DECISIVE
        )
        return cls(Phase.RUNNING if up else Phase.STARTING)
