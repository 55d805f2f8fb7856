"""summary.json, from what the processes wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from jackpot.bus import Ledger
from jackpot.config import parse_job
from jackpot.control_plane.sessions.summary import build_summary, lost_to_failures
from jackpot.storage.run_directory import RunDirectory
from jackpot.storage.run_records import read_summary, write_summary

SETTINGS: dict[str, Any] = {
    "state": "succeeded", "wall_seconds": 12.3456, "ledger": None, "restarts": {}, "resumed": False, "error": None,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    job = parse_job({"policy": {"model": "/m/p"}, "actor": {"model": "/m/a"}, "task": {"name": "complement"}})
    return RunDirectory.create(tmp_path / "run", "job-1", job)


def write(run: RunDirectory, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    (run.path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_summary_of_a_whole_run(run: RunDirectory) -> None:
    write(run, "metrics.jsonl", [
        {"step": 1, "rollout_corr/obrs_acceptance_rate": 0.5, "kl/policy_actor": 0.9},
        {"step": 2, "rollout_corr/obrs_acceptance_rate": 0.7, "kl/policy_actor": 0.5},
        {"step": 3, "rollout_corr/obrs_acceptance_rate": 0.9, "kl/policy_actor": 0.2},
    ])  # fmt: skip
    write(run, "evaluations.jsonl", [
        {"step": 0, "policy_accuracy": 0.2, "accuracy_stderr": 0.04, "comparable": True},
        {"step": 1, "policy_accuracy": 1.0, "accuracy_stderr": 0.0, "comparable": False},  # of 400 rewards 399 failed
        {"step": 2, "policy_accuracy": 0.9, "accuracy_stderr": 0.03, "comparable": True},
        {"step": 3, "policy_accuracy": 0.8, "accuracy_stderr": 0.02, "comparable": True},
    ])  # fmt: skip
    write(run, "reward_failures.jsonl", [{"completion": "x"}, {"completion": "y"}])
    ledger = Ledger(dispatched=9, trained=6, dropped={"stale": 2, "lost": 1}, open=0)
    summary = build_summary(run, **SETTINGS | {"ledger": ledger, "restarts": {"learner": 2, "scorer-0": 1}})
    assert summary == {
        "job_id": "job-1",
        "state": "succeeded",
        "steps": 3,
        "wall_seconds": 12.35,
        "policy_accuracy": {
            "initial": 0.2,
            "initial_stderr": 0.04,
            "final": 0.8,
            "final_stderr": 0.02,
            "best": 0.9,
            "not_comparable": 1,
        },
        "acceptance_rate": pytest.approx(0.7),
        "kl_policy_actor": {"initial": 0.9, "final": 0.2},
        "services": {},
        "ledger": {"dispatched": 9, "trained": 6, "dropped": {"stale": 2, "lost": 1}},
        "reward_failures": 2,
        "restarts": 3,
        "restarts_by_process": {"learner": 2, "scorer-0": 1},
        "resumed_from_step": None,
    }
    write_summary(run.files, summary)
    assert read_summary(run.files) == summary
    assert not list(run.path.glob(".summary*"))


def test_of_a_run_that_never_began_there_is_little_to_say(run: RunDirectory) -> None:
    summary = build_summary(run, **SETTINGS | {"state": "failed", "error": "no server"})
    assert summary["steps"] == 0 and summary["error"] == "no server" and summary["acceptance_rate"] is None
    accuracy = summary["policy_accuracy"]
    assert accuracy.pop("not_comparable") == 0
    assert set(accuracy.values()) == {None}
    assert summary["reward_failures"] == 0
    assert summary["ledger"] == {"dispatched": 0, "trained": 0, "dropped": {}}


def test_what_failures_kept_from_training_is_a_bias_and_what_was_filtered_is_none() -> None:
    dropped = {"reward_failed": 3, "zero_variance": 40, "prompt_unusable": 5, "unused": 7}
    ledger = {"dispatched": 200, "trained": 145, "dropped": dropped}
    lost = lost_to_failures(ledger)
    assert lost == {"prompt_unusable": 0.025, "reward_failed": 0.015}
    assert list(lost) == ["prompt_unusable", "reward_failed"]  # the greatest first
    assert lost_to_failures({"dispatched": 0, "trained": 0, "dropped": {}}) == {}


def test_steps_without_a_figure_do_not_count_towards_its_mean(run: RunDirectory) -> None:
    write(run, "metrics.jsonl", [
        {"step": 1, "rollout_corr/obrs_acceptance_rate": 0.4, "kl/policy_actor": None},
        {"step": 2, "rollout_corr/obrs_acceptance_rate": float("nan"), "kl/policy_actor": 0.3},
        {"step": 3},
    ])  # fmt: skip
    summary = build_summary(run, **SETTINGS)
    assert summary["acceptance_rate"] == 0.4
    assert summary["kl_policy_actor"] == {"initial": 0.3, "final": 0.3}


def test_without_the_bus_the_mirror_is_counted_each_group_once(run: RunDirectory) -> None:
    records = [
        {"group_id": "g1", "state": "trained", "reason": "", "step": 1, "detail": ""},
        {"group_id": "g2", "state": "dropped", "reason": "stale", "step": -1, "detail": ""},
        {"group_id": "g2", "state": "dropped", "reason": "stale", "step": -1, "detail": ""},
        {"group_id": "g3", "state": "dropped", "reason": "lost", "step": -1, "detail": ""},
    ]
    write(run, "ledger.jsonl", records)
    with (run.path / "ledger.jsonl").open("a") as file:
        file.write('{"group_id": "g4", "sta')
    assert build_summary(run, **SETTINGS)["ledger"] == {
        "dispatched": 3,
        "trained": 1,
        "dropped": {"stale": 1, "lost": 1},
    }


def test_groups_without_an_end_are_told(run: RunDirectory) -> None:
    ledger = Ledger(dispatched=5, trained=3, dropped={}, open=2)
    counted = build_summary(run, **SETTINGS | {"state": "stopped", "ledger": ledger})["ledger"]
    assert counted == {"dispatched": 5, "trained": 3, "dropped": {}, "open": 2}


def test_only_a_resumed_session_says_where_it_went_on(run: RunDirectory) -> None:
    (run.path / "resumed.json").write_text('{"resumed_from_step": 5, "time": 0.5}')
    assert build_summary(run, **SETTINGS)["resumed_from_step"] is None
    assert build_summary(run, **SETTINGS | {"resumed": True})["resumed_from_step"] == 5


def test_each_service_is_busy_with_its_main_work_and_does_or_awaits_the_others(run: RunDirectory) -> None:
    (run.path / "activity").mkdir()
    records = {
        "learner-0": {"service": "learner", "seconds": {"train": 6.0, "wait_groups": 3.0}, "wall_seconds": 10.0},
        "orchestrator-0": {"service": "orchestrator", "seconds": {"wait_weights": 9.0}, "wall_seconds": 10.0},
        "scorer-0": {"service": "scorer", "seconds": {"wait_groups": 1.0}, "wall_seconds": 0.0},
    }
    for name, record in records.items():
        (run.path / "activity" / f"{name}.json").write_text(json.dumps(record))
    (run.path / "activity" / "rollout-0.json").write_text("{")
    assert build_summary(run, **SETTINGS)["services"] == {
        "learner-0": {"busy": 0.6, "others": {"wait_groups": 0.3}},
        "orchestrator-0": {"busy": None, "others": {"wait_weights": 0.9}},
        "scorer-0": {"busy": 0.0, "others": {"wait_groups": 1.0}},
    }
