"""Trackers on real files: what a run wrote is read back with the trackers' own readers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jackpot.config import JobSpec, parse_job
from jackpot.control_plane.observing.trackers import TrackerFeed, require_trackers
from jackpot.errors import ConfigError
from jackpot.storage.run_directory import RunDirectory


@pytest.fixture
def make_job() -> Callable[..., JobSpec]:
    def make(*trackers: str, **tracking: str) -> JobSpec:
        return parse_job(
            {
                "policy": {"model": "policy"},
                "actor": "policy",
                "task": {"name": "complement"},
                "tracking": {"trackers": list(trackers), **tracking},
            }
        )

    return make


def open_run(directory: Path) -> RunDirectory:
    directory.mkdir(exist_ok=True)
    return RunDirectory(directory, "job-1")


def write(path: Path, *rows: dict[str, object]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def scalars(directory: Path) -> dict[str, list[tuple[int, float, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {
        tag: [(event.step, event.wall_time, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_holds_every_step_and_evaluation_once_over_two_sessions(
    tmp_path: Path, make_job: Callable[..., JobSpec]
) -> None:
    run, job = open_run(tmp_path), make_job("tensorboard")
    require_trackers(job)
    write(tmp_path / "metrics.jsonl", {"step": 1, "time": 10.0, "reward/mean": 0.25, "policy/loss": None})
    write(tmp_path / "evaluations.jsonl", {"step": 0, "time": 9.0, "policy_accuracy": 0.5})
    with TrackerFeed(run, job):
        pass
    # Between sessions step 1 is trained again from its checkpoint; after the last step comes the last evaluation.
    write(tmp_path / "metrics.jsonl", {"step": 1, "time": 11.0, "reward/mean": 0.25})
    with TrackerFeed(run, job):
        write(tmp_path / "metrics.jsonl", {"step": 2, "time": 12.0, "reward/mean": 0.75})
        write(tmp_path / "evaluations.jsonl", {"step": 2, "time": 13.0, "policy_accuracy": 1.0})
    assert scalars(tmp_path / "tensorboard") == {
        "reward/mean": [(1, 10.0, 0.25), (2, 12.0, 0.75)],
        "evaluation/policy_accuracy": [(0, 9.0, 0.5), (2, 13.0, 1.0)],
    }


def test_without_trackers_nothing_is_written(tmp_path: Path, make_job: Callable[..., JobSpec]) -> None:
    write(tmp_path / "metrics.jsonl", {"step": 1, "reward/mean": 0.25})
    with TrackerFeed(open_run(tmp_path), make_job()):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, make_job: Callable[..., JobSpec], name: str
) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"tracking\.trackers = '{name}'.*pip install 'jackpot\[{name}\]'"):
        require_trackers(make_job(name))


@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_an_offline_run(tmp_path: Path, make_job: Callable[..., JobSpec]) -> None:
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    run, job = open_run(tmp_path), make_job("wandb", wandb_mode="offline")
    write(tmp_path / "metrics.jsonl", {"step": 1, "time": 10.0, "reward/mean": 0.25})
    with TrackerFeed(run, job):
        pass
    (written,) = (tmp_path / "wandb").glob("offline-run-*-job-1/run-job-1.wandb")
    assert b"reward/mean" in written.read_bytes()
