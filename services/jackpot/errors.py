"""Every error that Jackpot raises on purpose. Each message says what is wrong and what to do about it.

``exit_code`` follows sysexits where a launcher has to tell "try again" from "never will":
2 and 78 are configuration and 70 is an alarm that stops the job (never retried), everything else may be retried.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class JackpotError(Exception):
    """Base of the tree. Shown to users as its message alone, never as a stack trace."""

    exit_code = 1


class ConfigError(JackpotError):
    """A setting that cannot work. Names the field, the value and the remedy."""

    exit_code = 2

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        self.field = field
        self.value = value
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{field} = {value!r}: {problem}. {remedy}")


class DeadlineError(JackpotError):
    """Something awaited did not happen in time. Names what was awaited and for how long."""

    def __init__(self, awaited: str, timeout_seconds: float, remedy: str = "") -> None:
        self.awaited = awaited
        self.timeout_seconds = timeout_seconds
        super().__init__(f"waited {timeout_seconds:g} s for {awaited}. {remedy}".strip())


class UnsupportedSamplingError(JackpotError):
    """Sampling settings under which the engine's log-probabilities are not those of the sampled distribution."""


class EngineError(JackpotError):
    """An inference engine failed; the request may be retried elsewhere."""


class QueueFullError(EngineError):
    """A server's queue is full; retry after ``retry_after_seconds``."""

    def __init__(self, retry_after_seconds: float) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__(f"the queue is full; retry after {retry_after_seconds:g} s")


class PromptError(JackpotError):
    """A prompt that cannot be encoded, or is too long for the models. It costs its own groups, and no other."""


class RewardError(JackpotError):
    """A reward function raised, timed out, or returned something that is not a finite number."""


class PayloadError(JackpotError):
    """A payload that cannot be read: corrupt, truncated, oversized, or of an unknown schema."""


class PayloadMissingError(PayloadError):
    """The bus names a payload that its store does not hold."""


class BusError(JackpotError):
    """The trajectory bus cannot do what was asked."""


class LeaseLostError(BusError):
    """Another consumer has taken this delivery over; its result must be thrown away."""


class BusLostError(BusError):
    """The server lost the job's state (FLUSHALL, failover to an empty replica)."""


class WeightError(JackpotError):
    """A weight version that cannot be published or loaded."""


class WeightMissingError(WeightError):
    """The weight store does not hold this version (any more)."""


class WeightCorruptError(WeightError):
    """A weight version whose bytes do not match its manifest, or whose tensors do not fit the model."""


class DamagedRecordError(JackpotError):
    """A file of a run directory that cannot be read. Names the file, and the line if it has several."""

    def __init__(self, path: object, line: int | None, why: str) -> None:
        self.why = why
        place = f"{path}" if line is None else f"{path}, line {line},"
        super().__init__(f"{place} is damaged ({why}); restore it or start a new run")


class DirectoryDamagedError(JackpotError):
    """A directory whose files are not those of its manifest. The message names the file."""


class ObjectStoreError(JackpotError):
    """An object store did not do what was asked. The message names bucket and key."""


class ObjectMissingError(ObjectStoreError):
    """The bucket does not hold this object (any more)."""


class ObjectConflictError(ObjectStoreError):
    """An object is not as a conditional write expected it: somebody else has written it."""


class ObjectCorruptError(ObjectStoreError):
    """An object whose bytes do not match its manifest."""


class ObjectUnavailableError(ObjectStoreError):
    """The object store did not answer, or said that it cannot now; it may be asked again."""


class ObjectRefusedError(ObjectStoreError):
    """The object store refuses: no such bucket, no credentials, or not the rights."""


class JobFailedError(JackpotError):
    """The job stopped because one of its processes keeps dying, or an alarm said so."""


class AlarmError(JobFailedError):
    """An alarm stopped the job, as it was told to. A restart would only raise it again."""

    exit_code = 70


class RequestRefusedError(JackpotError):
    """A server refuses a request that cannot work as it stands; retrying is no use."""


class ScoringError(JackpotError):
    """A group for which the target policy gives no finite scores."""


class JobNotFoundError(JackpotError):
    """The control plane knows no such job, or the job has no such thing."""


class JobStateError(JackpotError):
    """What was asked of a job is not possible in its state."""


class IdempotencyError(JackpotError):
    """An idempotency key that was used before, for another request."""


class ApiError(JackpotError):
    """The control plane's answer to a client is a refusal, or there is no answer.

    ``problem`` is the RFC 9457 document, empty if the server could not be reached.
    """

    def __init__(self, message: str, status: int = 0, problem: Mapping[str, Any] | None = None) -> None:
        self.status = status
        self.problem = dict(problem or {})
        # Refused input is the user's to correct, like a bad job file.
        self.exit_code = 2 if status in (400, 404, 409, 413, 415, 422) else 1
        super().__init__(message)
