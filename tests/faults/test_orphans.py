"""Whatever Jackpot starts on this machine ends with it, even if it is killed while its children's Python still loads.

The services ask for that themselves, once they run. Here they never get there: a slow disk, which is a sitecustomize
that sleeps.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml
from job_world import write_job

from jackpot.config import parse_job
from jackpot.experiment.grid import Run
from jackpot.experiment.worker import PIPELINE

MakeModel = Callable[..., Path]

# The programs themselves have loaded when the disk gets slow.
SLOW_DISK = "import os, sys; from {module} import main; os.environ['PYTHONPATH'] = sys.argv.pop(1); {call}"
JACKPOT = SLOW_DISK.format(module="jackpot.cli", call="main()")
STUDY_WORKER = SLOW_DISK.format(module="jackpot.experiment.worker", call="main(sys.argv[1:])")
DEADLINE_SECONDS = 150.0

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died"),
    pytest.mark.timeout(200),
]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("run", ["bus-server", "jackpot.learner", "jackpot.orchestrator", *["jackpot.rollout"] * 2, "jackpot.scorer"]),
        ("experiment", ["jackpot.experiment.worker"]),
        ("demo", ["jackpot.demo"]),
        ("replay", ["jackpot.replay"]),
    ],
)
def test_what_jackpot_starts_ends_when_it_is_killed(
    tmp_path: Path, make_model: MakeModel, command: str, expected: list[str]
) -> None:
    job_file = write_job(tmp_path, make_model)
    study = {
        "title": "Tiny",
        "job": "job.yaml",
        "arms": {"a": {}},
        "phases": {"main": {"purpose": "search", "seeds": [1]}},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | {"compare_to": "a"}))
    arguments = {
        "run": [str(job_file), "--run-dir", str(tmp_path / "run")],
        "experiment": [str(tmp_path / "study.yaml")],
        "demo": [],  # its models are made first
        "replay": [str(tmp_path)],
    }[command]
    with on_a_slow_disk(tmp_path, JACKPOT, command, *arguments) as process:
        assert_nothing_survives(process, expected)


def test_the_run_of_a_pipeline_study_ends_when_its_worker_is_killed(tmp_path: Path, make_model: MakeModel) -> None:
    job = yaml.safe_load(write_job(tmp_path, make_model).read_text())
    run = Run(parse_job(job), recipe=None, execution="pipeline", staleness=0, reference_age=0)
    with on_a_slow_disk(tmp_path, STUDY_WORKER, str(tmp_path / "results")) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps({"key": run.key, **run.request()}) + "\n")
        process.stdin.flush()
        assert_nothing_survives(process, ["jackpot run"])


def assert_nothing_survives(process: subprocess.Popen[str], expected: list[str]) -> None:
    """Kill a process once it has these children; they end as well."""
    children = wait_for_children(process, expected)
    process.kill()
    _, left = psutil.wait_procs(children, timeout=10)
    alive = [child for child in left if runs(child)]
    for child in alive:
        child.kill()
    assert not alive


@contextmanager
def on_a_slow_disk(directory: Path, program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A program, none of whose children in Python gets as far as its first line."""
    slow = directory / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text("import time\ntime.sleep(600)\n")
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(slow), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
        env=os.environ | {"JACKPOT_CACHE": str(directory / "cache")},
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def wait_for_children(process: subprocess.Popen[str], expected: list[str]) -> list[psutil.Process]:
    """Its children, once all of them are there and are what they shall be."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    names: list[str] = []
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr and process.stderr.read()
        children = psutil.Process(process.pid).children(recursive=True)
        names = sorted(name_of(child.cmdline()) for child in children)
        if names == sorted(expected):
            return children
        time.sleep(0.02)
    raise AssertionError(f"{names} instead of {sorted(expected)}")


def runs(process: psutil.Process) -> bool:
    """Whether it is more than an entry that nobody has collected."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def name_of(command: list[str]) -> str:
    if command[1:2] == ["-m"]:
        return command[2]
    if command[1:3] == ["-c", PIPELINE]:
        return f"jackpot {command[3]}"
    # Valkey puts its socket behind its name.
    return "bus-server" if "-server" in "".join(command[:1]) else " ".join(command)
