"""Whole jobs, run as users run them: `jackpot run` in a process of its own, on tiny random models."""

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
from typing import Any

import psutil
import yaml
from patience import PATIENCE_SECONDS

from jackpot.bus.kept_trajectories import KeptTrajectories
from jackpot.trajectory import seeded_as

MAX_GROUP_BYTES = 1 << 20

JACKPOT = [sys.executable, "-c", "from jackpot.cli import main; main()"]


def write_job(directory: Path, make_model: Callable[..., Path], **learner: Any) -> Path:
    """A job file on two random models of one vocabulary; the task's prompts are in their alphabet."""
    job = {
        "name": "tiny",
        "policy": {"model": str(make_model("qwen3", seed=1))},
        "actor": {"model": str(make_model("qwen3", seed=2, hidden_size=16, num_hidden_layers=1))},
        "task": {"name": "complement"},
        "sampling": {"max_tokens": 8, "group_size": 2},
        "learner": {"steps": 8, "groups_per_batch": 2, "checkpoint_every": 3, "lr": 1e-3} | learner,
        "evaluation": {"every": 4, "prompts": 8},
        "bus": {"lease_seconds": 5.0},
    }
    path = directory / "job.yaml"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    return path


class Run:
    """A `jackpot run` process and its run directory."""

    def __init__(self, process: subprocess.Popen[str], directory: Path) -> None:
        self.process = process
        self.directory = directory

    @property
    def step(self) -> int:
        """The newest step in metrics.jsonl."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is trained; fails if the run ends before."""
        self.wait_until(lambda: self.step >= step, f"step {step}")

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition; fails loudly if the run ends before or the deadline passes."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert self.process.poll() is None, f"the run ended before {what}:\n{self.output()}"
            assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS} s for {what}; at step {self.step}"
            time.sleep(0.02)

    def child(self, name: str) -> psutil.Process | None:
        """The live process of a service (``learner``, ``rollout-0``, ``evaluator``, …) or of the server."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if _process_name(process) == name and process.status() != psutil.STATUS_ZOMBIE:
                    return process
            except psutil.Error:
                continue
        return None

    def kill_child(self, name: str) -> int:
        """kill -9 one process; which one it was."""
        children: list[psutil.Process] = []

        def is_up() -> bool:
            child = self.child(name)
            children.extend([child] if child is not None else [])
            return bool(children)

        self.wait_until(is_up, f"{name} to be up")
        children[0].send_signal(signal.SIGKILL)
        return children[0].pid

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """The job trains no step meanwhile: its learner is stopped. So it cannot end before the test is ready."""
        self.wait_until(lambda: self.child("learner") is not None, "the learner to be up")
        learner = self.child("learner")
        assert learner is not None
        learner.suspend()
        try:
            yield
        finally:
            learner.resume()

    def finish(self, timeout_seconds: float = PATIENCE_SECONDS) -> tuple[int, str, str]:
        """Wait for the end: (exit code, stdout, stderr)."""
        stdout, stderr = self.process.communicate(timeout=timeout_seconds)
        return self.process.returncode, stdout, stderr

    def output(self) -> str:
        """Everything said so far, for an assertion's message."""
        logs = "".join(f"== {p.name}\n{p.read_text()[-1500:]}\n" for p in (self.directory / "logs").glob("*.log"))
        return logs + (self.process.stderr.read() if self.process.stderr and self.process.poll() is not None else "")

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json."""
        summary: dict[str, Any] = json.loads((self.directory / "summary.json").read_text(encoding="utf-8"))
        return summary


@contextmanager
def jackpot_run(*arguments: str, directory: Path) -> Iterator[Run]:
    """Start `jackpot run …` in a process group of its own; whatever is left of it is killed in the end."""
    process = subprocess.Popen(
        [*JACKPOT, "run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        yield Run(process, directory)
    finally:
        kill_group(process)
        process.communicate()


def kill_group(process: subprocess.Popen[str]) -> None:
    """kill -9 of the launcher's whole process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def sampled_tokens(directory: Path, batch: int) -> list[tuple[str, list[int], list[int]]]:
    """What a batch was trained on: the name, apart from its job, prompt and completion of every trajectory."""
    return [
        (seeded_as(trajectory.trajectory_id), scored.group.prompt_token_ids.tolist(), trajectory.token_ids.tolist())
        for scored in KeptTrajectories(directory, MAX_GROUP_BYTES).read(batch)
        for trajectory in scored.group.trajectories
    ]


def assert_ledger_adds_up(summary: dict[str, Any], trained: int) -> None:
    """Every dispatched group has exactly one terminal state, and as many were trained as the job says."""
    ledger = summary["ledger"]
    assert ledger["trained"] == trained
    assert ledger["dispatched"] == ledger["trained"] + sum(ledger["dropped"].values())
    assert ledger.get("open", 0) == 0


def assert_mirror_agrees(run: Run) -> None:
    """ledger.jsonl holds every group once, with the counts of the summary."""
    records = [json.loads(line) for line in (run.directory / "ledger.jsonl").read_text().splitlines()]
    assert len({record["group_id"] for record in records}) == len(records) == run.summary["ledger"]["dispatched"]
    trained = [record for record in records if record["state"] == "trained"]
    assert len(trained) == run.summary["ledger"]["trained"]


def _process_name(process: psutil.Process) -> str:
    command = process.cmdline()
    if any("valkey" in part or "redis-server" in part for part in command[:1]):
        return "bus-server"
    service = next((part.removeprefix("jackpot.") for part in command if part.startswith("jackpot.")), "")
    instance = process.environ().get("JACKPOT_INSTANCE", "")
    if service == "rollout":
        return "evaluator" if instance == "evaluator" else f"rollout-{instance}"
    return f"scorer-{instance}" if service == "scorer" else service
