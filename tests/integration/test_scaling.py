"""Rollout replicas come and go while a job trains: `jackpot scale`, and the same over REST."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from job_world import JACKPOT, assert_ledger_adds_up, assert_mirror_agrees, jackpot_run, write_job
from patience import PATIENCE_SECONDS, TEST_SECONDS

pytestmark = pytest.mark.timeout(TEST_SECONDS)

MakeModel = Callable[..., Path]


def scale(target: Path | str, replicas: int) -> subprocess.CompletedProcess[str]:
    command = [*JACKPOT, "scale", str(target), str(replicas)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)


def test_replicas_join_die_and_leave_while_the_job_trains(tmp_path: Path, make_model: MakeModel) -> None:
    job_file = write_job(tmp_path, make_model, steps=400, checkpoint_every=50)
    directory = tmp_path / "run"
    with jackpot_run(str(job_file), "--run-dir", str(directory), directory=directory) as run:
        run.wait_for_step(2)
        with run.standing_still():
            assert scale(directory, 3).returncode == 0
            for name in ("rollout-1", "rollout-2"):
                log = directory / "logs" / f"{name}.log"
                run.wait_until(lambda log=log: log.exists() and " ready" in log.read_text(), f"{name} to be ready")
        assert sorted(path.stem for path in (directory / "rollouts").glob("[0-9]*.json")) == ["1", "2"]
        with run.standing_still():
            killed = run.kill_child("rollout-2")
            # Not its absence in between, which may be over before anybody looks.
            run.wait_until(
                lambda: (child := run.child("rollout-2")) is not None and child.pid != killed,
                "rollout-2 to be started again",
            )
            assert scale(directory, 1).returncode == 0
            run.wait_until(
                lambda: run.child("rollout-1") is None and run.child("rollout-2") is None, "two replicas to leave"
            )
            run.wait_until(lambda: not list((directory / "rollouts").glob("[0-9]*.json")), "their traces to go")
            run.wait_until(
                lambda: not (directory / "metrics" / "rollout-2.json").exists(), "its metrics' address to go"
            )
        code, _, stderr = run.finish()
    assert code == 0, stderr
    assert run.summary["state"] == "succeeded" and run.summary["restarts_by_process"] == {"rollout-2": 1}
    assert_ledger_adds_up(run.summary, trained=800)
    assert_mirror_agrees(run)
    refused = scale(directory, 2)
    assert refused.returncode != 0 and "has succeeded already" in refused.stderr
    rows = [json.loads(line) for line in (directory / "scalings.jsonl").read_text().splitlines()]
    assert [(row["before"], row["rollout_replicas"], row["error"]) for row in rows] == [(1, 3, None), (3, 1, None)]


def test_what_cannot_be_scaled_is_said(tmp_path: Path) -> None:
    refused = scale(tmp_path, 2)
    assert refused.returncode == 2 and "is not a run directory" in refused.stderr
