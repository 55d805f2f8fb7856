"""The contents of a run directory's files: each record's class, its one writer and its one reader.

Rows of figures (``metrics.jsonl`` and the launcher's observations) have columns that depend on the job. They are read
untyped, by :class:`StepRows` or :class:`jackpot.storage.json_files.JsonLinesReader`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from jackpot.storage.json_files import (
    JsonLinesReader,
    Row,
    read_object_if_whole,
    read_record_if_whole,
    replace_json,
)
from jackpot.storage.run_directory import RunFiles


@dataclass(frozen=True, slots=True)
class TerminalRecord:
    """How one group ended: a row of the ledger."""

    group_id: str
    state: Literal["trained", "dropped"]
    reason: str  # empty for trained
    step: int  # the optimizer step after which it counts as trained; −1 for dropped
    detail: str


def read_ledger(files: RunFiles) -> list[TerminalRecord]:
    """How each group ended, in the order of the file; if a group has two rows, the last counts.

    For observers of the run: a damaged line is logged and left out.
    """
    return list({record.group_id: record for record in JsonLinesReader(files.ledger).records(TerminalRecord)}.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRow:
    """One evaluation of the policy on held-out prompts."""

    step: int  # the oldest policy version that sampled a token
    newest_step: int  # the newest: the server may swap weights while an evaluation runs
    time: float  # seconds since the epoch
    policy_accuracy: float  # fraction of samples with a reward of 1: mean@n
    accuracy_stderr: float | None  # its standard error over prompts; None for a single one
    pass_at_n: float  # fraction of prompts with a reward of 1 among their n = evaluation.samples_per_prompt samples
    mean_reward: float
    num_prompts: int  # distinct ones
    num_samples: int  # judged; with on_reward_failure: zero also those whose reward failed
    num_reward_failures: int
    num_unreadable: int  # samples that their grader could not read: wrong answers
    comparable: bool  # no more rewards failed than evaluation.max_failure_share
    mean_tokens: float
    truncated_fraction: float


@dataclass(frozen=True, slots=True)
class HeldOutAccuracy:
    """The fields of an :class:`EvaluationRow` that training decides by."""

    step: int
    policy_accuracy: float
    comparable: bool = True


def read_accuracies(evaluations: Path) -> list[HeldOutAccuracy]:
    """The held-out accuracies so far, in the order of the file. An incomplete last row is left out.

    Raises:
        DamagedRecordError: names the file and the line.
    """
    return JsonLinesReader(evaluations, strict=True).records(HeldOutAccuracy)


def best_step(evaluations: Path, among: Collection[int]) -> int | None:
    """The given step with the greatest held-out accuracy; the newest of equals. None if none was evaluated.

    Evaluations in which too many rewards failed are not compared.

    Raises:
        DamagedRecordError: as :func:`read_accuracies`.
    """
    rows = [row for row in read_accuracies(evaluations) if row.step in among and row.comparable]
    ranked = [(row.policy_accuracy, row.step) for row in rows]
    return max(ranked)[1] if ranked else None


class StepRows:
    """The rows of a growing file with a ``step`` column, by step; if a step has two rows, the last counts.

    For observers of the run: a damaged line is logged and left out.

    Args:
        path: of the file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._reader = JsonLinesReader(path)
        self._rows: dict[int, Row] = {}

    def refresh(self) -> list[Row]:
        """All rows so far, in the order of their steps; reads only new ones."""
        for row in self._reader.rows():
            if isinstance(row.get("step"), int):
                self._rows[row["step"]] = row
        return [self._rows[step] for step in sorted(self._rows)]


def read_steps(files: RunFiles) -> list[Row]:
    """A row of figures per optimizer step, as :class:`StepRows`."""
    return StepRows(files.metrics).refresh()


def read_evaluations(files: RunFiles) -> list[Row]:
    """The evaluations by step, as :class:`StepRows`."""
    return StepRows(files.evaluations).refresh()


@dataclass(frozen=True, slots=True)
class ActivityRecord:
    """What one service process has spent its time on so far."""

    service: str
    seconds: Mapping[str, float]  # by activity
    wall_seconds: float

    def write(self, files: RunFiles, instance: str) -> None:
        """Write it into the run directory.

        Raises:
            OSError: the disk is full or gone.
        """
        files.activities.mkdir(exist_ok=True)
        replace_json(files.activities / f"{self.service}-{instance}.json", asdict(self))


def read_activities(files: RunFiles) -> dict[str, ActivityRecord]:
    """The records of the last session, by service and replica."""
    return {
        path.stem: record
        for path in sorted(files.activities.glob("[!.]*.json"))
        if (record := read_record_if_whole(path, ActivityRecord)) is not None
    }


@dataclass(frozen=True, slots=True)
class Resumption:
    """Where training last resumed."""

    resumed_from_step: int
    time: float  # seconds since the epoch


def write_resumption(files: RunFiles, step: int) -> None:
    """Record that training resumes from the checkpoint of ``step``.

    Raises:
        OSError: the disk is full or gone.
    """
    replace_json(files.resumed, asdict(Resumption(step, time.time())))


def read_resumption(files: RunFiles) -> Resumption | None:
    """Where training last resumed; None if it never did."""
    return read_record_if_whole(files.resumed, Resumption)


def write_summary(files: RunFiles, summary: Mapping[str, object]) -> None:
    """Write the outcome of a session.

    Raises:
        OSError: the disk is full or gone.
    """
    replace_json(files.summary, summary, indent=2)


def read_summary(files: RunFiles) -> Row | None:
    """The outcome of the last session, if there is one."""
    return read_object_if_whole(files.summary)
