"""What it costs to be services: trajectories per second of the pipeline against one process doing the same in turn.

    python benchmarks/pipeline.py [examples/demo.yaml] [key=value …]

Both train the same job (same models, task, batch and mathematics) for the same number of steps; the pipeline's rate
is taken from the second step's end to the last one's, so that neither side's start-up counts. The two alternate, so
that a noisy machine hits both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jackpot.config import JobSpec, load_job

SINGLE = Path(__file__).parent / "single_process_loop.py"


@dataclass(frozen=True)
class Run:
    """What `jackpot run` left behind."""

    rows: list[dict[str, Any]]
    """Of ``metrics.jsonl``, one a step."""
    created: float
    summary: dict[str, Any]

    @property
    def first_step_seconds(self) -> float:
        """From the start to the end of the first step."""
        return float(self.rows[0]["time"] - self.created)


def run_job(job_file: Path, overrides: list[str]) -> Run:
    """Run a job to its end.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        command = [sys.executable, "-c", "from jackpot.cli import main; main()", "run", str(job_file), *overrides]
        done = subprocess.run([*command, "--run-dir", str(run_dir)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"jackpot run ended with {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        created = json.loads((run_dir / "run.json").read_text())["created"]
        return Run(rows, created, json.loads((run_dir / "summary.json").read_text()))


def rate_of(run: Run, job: JobSpec) -> float:
    """Trajectories per second, from the second step's end to the last one's."""
    first, last = run.rows[1], run.rows[-1]
    batches = (last["step"] - first["step"]) / job.learner.updates_per_batch
    trajectories = batches * job.learner.groups_per_batch * job.sampling.group_size
    return float(trajectories / (last["time"] - first["time"]))


def single_process_rate(job_file: Path, overrides: list[str]) -> float:
    """Trajectories per second of the single-process loop, evaluation left out as the pipeline does it beside."""
    with tempfile.NamedTemporaryFile("r", suffix=".jsonl") as result:
        command = [sys.executable, str(SINGLE), str(job_file), *overrides, "--json", result.name]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return float(json.loads(result.read().splitlines()[-1])["samples_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job_file", nargs="?", type=Path, default=Path("examples/demo.yaml"))
    parser.add_argument("overrides", nargs="*", default=["learner.steps=60"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_intermixed_args()
    job = load_job(arguments.job_file, arguments.overrides)
    ratios = []
    for round_number in range(arguments.rounds):
        run = run_job(arguments.job_file, arguments.overrides)
        pipeline, startup = rate_of(run, job), run.first_step_seconds
        single = single_process_rate(arguments.job_file, arguments.overrides)
        ratios.append(pipeline / single)
        print(
            f"round {round_number + 1}: pipeline {pipeline:.0f} trajectories/s, single process {single:.0f}, "
            f"ratio {ratios[-1]:.2f}; first step after {startup:.1f} s",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.2f} (goal: at least 0.6)")


if __name__ == "__main__":
    main()
