"""`jackpot experiment` as a process: it runs a grid, survives being killed, and writes the same report again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from patience import PATIENCE_SECONDS, TEST_SECONDS

pytestmark = pytest.mark.timeout(TEST_SECONDS)

COMMAND = [sys.executable, "-c", "from jackpot.cli import main; main()", "experiment"]


def write_study(directory: Path, make_model: Callable[..., Path], seeds: list[int], **changes: object) -> Path:
    job = {
        "policy": {"model": str(make_model("qwen3", seed=1))},
        "actor": {"model": str(make_model("qwen3", seed=2, hidden_size=16, num_hidden_layers=1))},
        "task": {"name": "complement"},
        "sampling": {"group_size": 2, "max_tokens": 4},
        "learner": {"groups_per_batch": 2, "steps": 30, "lr": 1e-3},
        "evaluation": {"every": 10, "prompts": 2},
    }
    (directory / "job.yaml").write_text(yaml.safe_dump(job))
    (directory / "found.md").write_text("## What was found\n\nNothing, in 30 steps.\n")
    study = {
        "title": "A tiny study",
        "job": "job.yaml",
        "notes": "found.md",
        "arms": {"TIS": {"settings": ["algorithm.correction=tis"]}, "Jackpot": {}},
        "phases": {"main": {"purpose": "confirmation", "seeds": seeds}},
        "compare_to": "TIS",
    } | changes
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def experiment(*arguments: object, seconds: float = PATIENCE_SECONDS) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)


def test_a_study_that_is_killed_goes_on_where_it_was_and_reports_alike(
    tmp_path: Path, make_model: Callable[..., Path]
) -> None:
    study = write_study(tmp_path, make_model, [1, 2, 3])
    runs = tmp_path / "tiny" / "runs"
    process = subprocess.Popen([*COMMAND, str(study)], start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(list(runs.glob("*.json"))) < 2:
        assert process.poll() is None, "the study ended before it could be killed"
        assert time.monotonic() < deadline, "no two runs in time"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert not (tmp_path / "tiny" / "results.json").exists()

    again = experiment(study)
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip() == str(tmp_path / "tiny.md")
    assert f"{6 - len(finished)} of 6 runs are to be made" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    collected = json.loads((tmp_path / "tiny" / "results.json").read_text())
    assert sorted(run["seed"] for run in collected["runs"]) == [1, 1, 2, 2, 3, 3]
    assert {path.stem for path in runs.glob("*.json")} == {run["key"] for run in collected["runs"]}

    # From the collected results alone: the same report, figures and all, and nothing is run.
    written = {path: path.read_bytes() for path in (tmp_path / "tiny").iterdir() if path.is_file()}
    report = (tmp_path / "tiny.md").read_text()
    for path in (*runs.iterdir(), *(p for p in written if p.name != "results.json"), tmp_path / "tiny.md"):
        path.unlink()
    runs.rmdir()
    assert experiment(study).returncode == 0
    assert (tmp_path / "tiny.md").read_text() == report
    assert {path: path.read_bytes() for path in written} == written
    assert not runs.exists()

    assert report.startswith("# A tiny study\n\n## What was found\n\nNothing, in 30 steps.")
    assert "| TIS | 3 |" in report and "| Jackpot | 3 |" in report
    assert {path.name for path in written} == {"results.json", "runs.csv", "main-curves.svg", "main-bars.svg"}
    assert len((tmp_path / "tiny" / "runs.csv").read_text().splitlines()) == 7


def test_one_that_is_interrupted_ends_without_a_trace(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    study = write_study(tmp_path, make_model, [1, 2, 3])
    process = subprocess.Popen(
        [*COMMAND, str(study), "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not list((tmp_path / "tiny" / "runs").glob("*.json")):
            assert process.poll() is None and time.monotonic() < deadline, "no run in time"
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130 and "Traceback" not in stdout + stderr, stderr


def test_one_run_that_fails_does_not_cost_the_others(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    study = write_study(tmp_path, make_model, [1])
    data = yaml.safe_load(study.read_text())
    data["arms"] = {"broken": {"settings": ["policy.model=/nowhere"]}, **data["arms"]}
    study.write_text(yaml.safe_dump(data, sort_keys=False))
    found = experiment(study, "--out", tmp_path / "out")
    assert found.returncode == 1
    assert "error: 1 runs failed; run it again to try them again. seed 1" in found.stderr
    assert "'/nowhere'" in found.stderr and "Traceback" not in found.stderr
    collected = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(collected["runs"]) == 2
    # What there is can be reported all the same.
    assert experiment(study, "--out", tmp_path / "out", "--report-only").returncode == 0
    assert "| Jackpot | 1 |" in (tmp_path / "out.md").read_text()


def test_runs_may_be_jobs_of_the_pipeline(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    arms = {"Jackpot": {"settings": ["learner.steps=4"]}}
    study = write_study(tmp_path, make_model, [1], execution="pipeline", arms=arms, compare_to="Jackpot")
    found = experiment(study, seconds=TEST_SECONDS)
    assert found.returncode == 0, found.stderr
    (run,) = json.loads((tmp_path / "tiny" / "results.json").read_text())["runs"]
    assert [step for step, _ in run["evaluations"]] == [0, 4]
    assert 0 < run["series"]["acceptance"][0] < 1
    assert [path.name for path in (tmp_path / "tiny" / "runs").iterdir()] == [f"{run['key']}.json"]
    assert "`execution: pipeline`" in (tmp_path / "tiny.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--phase", "other"], "--phase = 'other': is no phase of this study. It has main."),
        (["--report-only"], "has no results"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    tmp_path: Path, make_model: Callable[..., Path], arguments: list[str], message: str
) -> None:
    found = experiment(write_study(tmp_path, make_model, [1]), *arguments)
    assert found.returncode == 2
    assert found.stderr.startswith("error: ") and message in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
