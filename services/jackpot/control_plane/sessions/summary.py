"""The outcome of a run, from its processes' files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jackpot.bus import Ledger
from jackpot.storage.json_files import Row
from jackpot.storage.run_directory import RunDirectory
from jackpot.storage.run_records import (
    ActivityRecord,
    read_activities,
    read_evaluations,
    read_ledger,
    read_resumption,
    read_steps,
)

State = Literal["succeeded", "failed", "stopped"]

MAIN_WORK = {"learner": "train", "scorer": "score", "rollout": "generate"}
"""The main activity of each service; the orchestrator has none that could fill its time."""

NO_LOSS = ("zero_variance", "unused")
"""Reasons for which a group is dropped on purpose."""


def build_summary(
    run: RunDirectory,
    *,
    state: State,
    wall_seconds: float,
    ledger: Ledger | None,
    restarts: Mapping[str, int],
    resumed: bool,
    error: str | None,
) -> dict[str, Any]:
    """The summary of this session of a run.

    Args:
        run: the run directory.
        state: how it ended.
        wall_seconds: of this session.
        ledger: the bus's counters; None if the bus could not be asked, and then the ledger on disk is counted.
        restarts: how often each process was restarted.
        resumed: whether this session continued an earlier one.
        error: why it failed.
    """
    steps, evaluations = read_steps(run.files), read_evaluations(run.files)
    resumption = read_resumption(run.files)
    divergences = _series(steps, "kl/policy_actor")
    summary = {
        "job_id": run.job_id,
        "state": state,
        "steps": int(steps[-1]["step"]) if steps else 0,
        "wall_seconds": round(wall_seconds, 2),
        "policy_accuracy": _accuracy(evaluations),
        "acceptance_rate": _mean(_series(steps, "rollout_corr/obrs_acceptance_rate")),
        "kl_policy_actor": {
            "initial": divergences[0] if divergences else None,
            "final": divergences[-1] if divergences else None,
        },
        "services": {name: _shares(record) for name, record in read_activities(run.files).items()},
        "ledger": _ledger(run, ledger),
        "reward_failures": _count_lines(run.files.reward_failures),
        "restarts": sum(restarts.values()),
        "restarts_by_process": dict(restarts),
        "resumed_from_step": resumption.resumed_from_step if resumed and resumption is not None else None,
    }
    return summary if error is None else summary | {"error": error}


def lost_to_failures(ledger: Mapping[str, Any]) -> dict[str, float]:
    """The share of the groups dispatched that each cause kept from training, greatest first.

    What these groups have in common the policy did not learn from: a bias. Filtered groups and those that the job's end
    left over are no such loss.

    Args:
        ledger: of a summary.
    """
    dispatched = max(1, ledger["dispatched"])
    lost = {reason: count / dispatched for reason, count in ledger["dropped"].items() if reason not in NO_LOSS}
    return dict(sorted(lost.items(), key=lambda item: -item[1]))


def _accuracy(evaluations: Sequence[Row]) -> dict[str, float | None]:
    """The first, last and best accuracy; those in which too many rewards failed are no candidates for the best."""
    compared = [row["policy_accuracy"] for row in evaluations if row.get("comparable", True)]
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    return {
        "initial": first.get("policy_accuracy"),
        "initial_stderr": first.get("accuracy_stderr"),
        "final": last.get("policy_accuracy"),
        "final_stderr": last.get("accuracy_stderr"),
        "best": max(compared, default=None),
        "not_comparable": len(evaluations) - len(compared),
    }


def _count_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _shares(record: ActivityRecord) -> dict[str, Any]:
    """The share of its time that a service spent on its main work, and what else it did or waited for."""
    wall = max(record.wall_seconds, 1e-9)
    shares = {name: round(min(1.0, seconds / wall), 4) for name, seconds in record.seconds.items()}
    busy = shares.pop(MAIN_WORK[record.service], 0.0) if record.service in MAIN_WORK else None
    return {"busy": busy, "others": shares}


def _ledger(run: RunDirectory, ledger: Ledger | None) -> dict[str, Any]:
    if ledger is not None:
        counts = {"dispatched": ledger.dispatched, "trained": ledger.trained, "dropped": dict(ledger.dropped)}
        return counts | ({"open": ledger.open} if ledger.open else {})
    dropped: dict[str, int] = {}
    trained = 0
    for record in read_ledger(run.files):
        if record.state == "trained":
            trained += 1
        else:
            dropped[record.reason] = dropped.get(record.reason, 0) + 1
    return {"dispatched": trained + sum(dropped.values()), "trained": trained, "dropped": dropped}


def _series(rows: Sequence[Row], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None and math.isfinite(row[name])]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
