"""Whole jobs under kill -9: they end well, and the ledger adds up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from job_world import (
    JACKPOT,
    Run,
    assert_ledger_adds_up,
    assert_mirror_agrees,
    jackpot_run,
    kill_group,
    write_job,
)
from patience import PATIENCE_SECONDS, TEST_SECONDS

pytestmark = pytest.mark.timeout(TEST_SECONDS)

MakeModel = Callable[..., Path]

PROCESSES = ("rollout-0", "scorer-0", "learner", "orchestrator", "evaluator", "bus-server")


def test_every_process_may_be_killed_while_the_job_goes_on(tmp_path: Path, make_model: MakeModel) -> None:
    job_file = write_job(tmp_path, make_model, steps=120, checkpoint_every=5)
    directory = tmp_path / "run"
    with jackpot_run(str(job_file), "--run-dir", str(directory), directory=directory) as run:
        for number, name in enumerate(PROCESSES):
            run.wait_for_step(4 + number * 12)
            run.kill_child(name)
        code, _, stderr = run.finish()
    assert code == 0, stderr
    assert run.summary["state"] == "succeeded" and run.summary["steps"] == 120
    assert run.summary["restarts_by_process"] == dict.fromkeys(PROCESSES, 1)
    assert_ledger_adds_up(run.summary, trained=240)
    assert_mirror_agrees(run)
    steps = {json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()}
    assert steps == set(range(1, 121))
    assert len(list((directory / "manifests").glob("*.json"))) == 120
    assert not list((directory / "payloads").rglob("*.bin"))


def test_where_no_scorer_runs_a_killed_orchestrator_loses_and_doubles_nothing(
    tmp_path: Path, make_model: MakeModel
) -> None:
    job_file = write_job(tmp_path, make_model, steps=40, checkpoint_every=5)
    directory = tmp_path / "run"
    arguments = ["scorer.reuse_reference=true", "--run-dir", str(directory)]
    with jackpot_run(str(job_file), *arguments, directory=directory) as run:
        for step in (4, 16):
            run.wait_for_step(step)
            run.kill_child("orchestrator")
        assert run.child("scorer-0") is None
        code, _, stderr = run.finish()
    assert code == 0, stderr
    assert run.summary["state"] == "succeeded" and run.summary["steps"] == 40
    assert run.summary["restarts_by_process"] == {"orchestrator": 2}
    assert run.summary["ledger"] == {"dispatched": 80, "trained": 80, "dropped": {}}
    assert_mirror_agrees(run)
    assert not list((directory / "payloads").rglob("*.bin"))


def test_a_run_killed_as_a_whole_is_resumed_from_its_checkpoint(tmp_path: Path, make_model: MakeModel) -> None:
    job_file = write_job(tmp_path, make_model, steps=60, checkpoint_every=5)
    directory = tmp_path / "run"
    with jackpot_run(str(job_file), "--run-dir", str(directory), directory=directory) as run:
        run.wait_for_step(12)
        kill_group(run.process)
        run.process.wait()
    checkpoint = max(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit())
    assert 10 <= checkpoint < 60

    with jackpot_run("--resume", str(directory), "--json", directory=directory) as run:
        code, stdout, stderr = run.finish()
    assert code == 0, stderr
    summary = json.loads(stdout.splitlines()[-1])
    assert summary["resumed_from_step"] == checkpoint
    assert summary["steps"] == 60
    assert_ledger_adds_up(summary, trained=120)
    assert_mirror_agrees(run)

    again = subprocess.run(
        [*JACKPOT, "run", "--resume", str(directory)], capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert again.returncode == 2 and "has finished already" in again.stderr


def test_interrupting_stops_everything_and_says_how_to_go_on(tmp_path: Path, make_model: MakeModel) -> None:
    job_file = write_job(tmp_path, make_model, steps=10_000)
    directory = tmp_path / "run"
    # No death is allowed: services that Ctrl-C ended must not be taken for dying ones.
    arguments = [str(job_file), "run.max_restarts=0", "--run-dir", str(directory)]
    with jackpot_run(*arguments, directory=directory) as run:
        run.wait_for_step(2)
        # As a terminal does it: to every process of the foreground group.
        stdout = assert_stops(run, lambda: os.killpg(run.process.pid, signal.SIGINT))
    assert f"jackpot run --resume {directory}" in stdout
    assert run.summary["state"] == "stopped" and run.summary["restarts"] == 0

    step = run.step
    with jackpot_run("--resume", str(directory), directory=directory) as run:
        run.wait_for_step(step + 1)
        again = subprocess.run([*JACKPOT, "run", "--resume", str(directory)], capture_output=True, text=True)
        assert again.returncode == 1 and "is running already" in again.stderr and "Traceback" not in again.stderr
        # As a service manager does it: to the launcher alone.
        assert_stops(run, lambda: run.process.send_signal(signal.SIGTERM))
    assert run.summary["state"] == "stopped" and run.summary["resumed_from_step"] is not None


def assert_stops(run: Run, interrupt: Callable[[], None]) -> str:
    """The run ends with exit code 130, and every process with it; returns its stdout."""
    children = [run.child(name) for name in PROCESSES]
    interrupt()
    code, stdout, stderr = run.finish()
    assert code == 130, stderr
    assert all(child is not None and not child.is_running() for child in children)
    return stdout


def test_interrupting_while_everything_starts_is_a_stop_and_no_failure(tmp_path: Path, make_model: MakeModel) -> None:
    job_file = write_job(tmp_path, make_model)
    directory = tmp_path / "run"
    arguments = [str(job_file), "run.max_restarts=0", "--run-dir", str(directory), "--json"]
    with jackpot_run(*arguments, directory=directory) as run:
        run.wait_until(lambda: run.child("orchestrator") is not None, "the last process to be started")
        # Services that are still loading die of this at once, before the launcher looks again.
        os.killpg(run.process.pid, signal.SIGINT)
        code, stdout, stderr = run.finish()
    assert code == 130, stderr
    summary = json.loads(stdout)
    assert summary["state"] == "stopped" and summary["steps"] == 0 and summary["restarts"] == 0
    assert "error" not in summary and "Traceback" not in stderr


def test_no_process_outlives_a_launcher_that_was_killed_while_it_started_them(
    tmp_path: Path, make_model: MakeModel
) -> None:
    job_file = write_job(tmp_path, make_model, steps=10_000)
    directory = tmp_path / "run"
    with jackpot_run(str(job_file), "--run-dir", str(directory), directory=directory) as run:
        run.wait_until(lambda: run.child("orchestrator") is not None, "the last process to be started")
        children = psutil.Process(run.process.pid).children(recursive=True)
        run.process.kill()  # the launcher alone
        run.process.wait()
        _, alive = psutil.wait_procs(children, timeout=PATIENCE_SECONDS)
    assert len(children) == len(PROCESSES) and alive == []


def test_a_process_that_keeps_dying_stops_the_job_with_its_last_words(tmp_path: Path, make_model: MakeModel) -> None:
    job_file = write_job(tmp_path, make_model, steps=10_000)
    directory = tmp_path / "run"
    arguments = ["run.max_restarts=0", "--run-dir", str(directory)]
    with jackpot_run(str(job_file), *arguments, directory=directory) as run:
        run.wait_for_step(2)
        run.kill_child("learner")
        code, _, stderr = run.finish()
    assert code == 1
    assert "learner keeps dying (signal 9)" in stderr and "Traceback" not in stderr
    assert run.summary["state"] == "failed" and "learner" in run.summary["error"]
