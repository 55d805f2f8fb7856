"""What the control plane knows about a job: the record that it stores and that REST returns unchanged."""

from __future__ import annotations

import re
import secrets
import time
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from jackpot.control_plane.jobs.states import JobState
from jackpot.process.scaling import MAX_ROLLOUT_REPLICAS

JOB_ID_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
LABEL_PATTERN = r"^[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?$"
LABEL_VALUE_PATTERN = r"^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$"
MAX_LABELS = 16
MAX_PRIORITY = 1000

_JOB_ID = re.compile(JOB_ID_PATTERN)


class Record(BaseModel):
    """Base: frozen, strict about names; the docstring under a field is its description in the OpenAPI document."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Progress(Record):
    """How far a job has come."""

    step: int = 0
    """Finished optimizer steps."""
    policy_accuracy: float | None = None
    """The newest held-out accuracy of the policy."""
    accuracy_stderr: float | None = None
    """Its standard error over prompts."""
    reward: float | None = None
    """Mean reward of the newest batch."""
    acceptance_rate: float | None = None
    """Mean acceptance probability of the newest batch."""


class JobRecord(Record):
    """One job."""

    id: Annotated[str, Field(pattern=JOB_ID_PATTERN)]
    """The job's id."""
    name: str
    """The name in the job file."""
    state: JobState
    """Where the job stands."""
    reason: str
    """Why it is in this state."""
    error: str | None = None
    """Why it failed."""
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    """Greater starts earlier; equals start in the order of submission."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels by which the submitter finds it."""
    owner: str | None = None
    """Name of the token that submitted it."""
    created: AwareDatetime
    """When it was submitted."""
    updated: AwareDatetime
    """When its state last changed."""
    started: AwareDatetime | None = None
    """When its processes were first started."""
    finished: AwareDatetime | None = None
    """When it ended; null while it has not."""
    session: int = 0
    """How often its processes have been started."""
    losses: int = 0
    """How often its processes were lost since it was last submitted or resumed on request."""
    steps: int
    """Optimizer steps in all."""
    progress: Progress = Progress()
    """How far it has come."""


class Transition(Record):
    """One change of a job's state."""

    time: AwareDatetime
    """When."""
    before: JobState | None
    """The state before; null for a new job."""
    state: JobState
    """The state since."""
    reason: str
    """Why."""


class JobList(Record):
    """A page of jobs, newest first."""

    jobs: list[JobRecord]
    """The jobs."""
    next_cursor: str | None
    """Ask for the next page with this; null on the last one. A filtered page may be short although more follow."""


class JobDetail(JobRecord):
    """A job, whole."""

    spec: dict[str, Any]
    """The job file with every default."""
    rollout_replicas: int
    """Rollout replicas that it should have: the number in the job file, or the last one asked for."""
    transitions: list[Transition]
    """Every change of its state, oldest first."""


class ScaleRequest(Record):
    """What a running job is scaled to."""

    rollout_replicas: Annotated[int, Field(ge=1, le=MAX_ROLLOUT_REPLICAS)]
    """Rollout replicas from now on."""


class DryRun(Record):
    """A job that would be accepted."""

    valid: bool
    """Always true: for a job that would be refused, the answer is a problem document."""
    spec: dict[str, Any]
    """The job file with every default."""
    notes: list[str]
    """What can only be checked when the job starts."""


def new_job_id(name: str) -> str:
    """A job id: the job's name, the time, and random digits."""
    return f"{name}-{time.strftime('%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


def is_job_id(text: str) -> bool:
    """Whether the text can be the id of a job; anything else is never made part of a path or a key."""
    return _JOB_ID.fullmatch(text) is not None


def now() -> datetime:
    """This moment, in UTC."""
    return datetime.now(UTC)
