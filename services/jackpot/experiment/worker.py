"""``python -m jackpot.experiment.worker DIRECTORY``: executes runs that arrive as JSON lines on stdin, one at a time.

A run's file exists before its answer is written to stdout. Only this module of a study loads torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from jackpot.config import JobSpec, parse_job
from jackpot.demo.recipe import RECIPES, Recipe, builtin_models_missing, cache_root, resolve_builtin
from jackpot.demo.warmup import make_models
from jackpot.errors import JackpotError
from jackpot.experiment.grid import Run
from jackpot.experiment.inline import run_loop
from jackpot.experiment.records import Result, make_result, write_result
from jackpot.loop import Loop
from jackpot.process.children import ending_with_us
from jackpot.storage.run_directory import RunFiles
from jackpot.storage.run_records import read_accuracies, read_steps

PIPELINE = "from jackpot.cli import main; main()"


def main(arguments: list[str]) -> int:
    """Serve until stdin ends; the exit code."""
    directory = Path(arguments[0])
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {"key": request["key"], "error": None}
        try:
            result = make_run(_run(request), directory)
            write_result(directory, result)
            answer |= {"accuracy": result.evaluations[-1][1], "seconds": result.seconds}
        except JackpotError as error:
            answer["error"] = str(error)
        except Exception as error:  # the process's outermost frame: one bad run must not end the others
            traceback.print_exc()
            answer["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)
    return 0


def make_run(run: Run, directory: Path) -> Result:
    """Execute one run.

    Raises:
        JackpotError: it cannot work.
    """
    job = _with_models(run)
    if run.execution == "pipeline":
        return _pipeline(run, job, directory)
    started = time.process_time()
    curve = run_loop(Loop(job, staleness=run.staleness, reference_age=run.reference_age))
    return make_result(run, curve.evaluations, curve.steps, time.process_time() - started, curve.failure)


def _pipeline(run: Run, job: JobSpec, directory: Path) -> Result:
    """`jackpot run` in a separate directory; its curves are kept."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pipeline-", dir=directory) as scratch:
        job_file, run_dir = Path(scratch) / "task.json", Path(scratch) / "run"
        job_file.write_text(json.dumps(job.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
        command = [sys.executable, "-c", PIPELINE, "run", str(job_file), "--run-dir", str(run_dir), "--json"]
        done = subprocess.run(ending_with_us(command), capture_output=True, text=True, check=False)
        if done.returncode:
            raise JackpotError(f"jackpot run ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        summary = json.loads(done.stdout.splitlines()[-1])
        steps, accuracies = read_steps(RunFiles(run_dir)), read_accuracies(RunFiles(run_dir).evaluations)
    points = [(row.step, row.policy_accuracy) for row in accuracies]
    return make_result(run, points, steps, summary["wall_seconds"], None)


def _with_models(run: Run) -> JobSpec:
    """The job with its models made, and named by their directories."""
    job = run.job
    if run.recipe is not None:
        made = make_models(run.recipe, cache_root())
        policy, actor = str(made / "policy"), str(made / "actor")
    else:
        for name in builtin_models_missing(job):
            make_models(RECIPES[name], cache_root())
        policy = _directory(job.policy.model)
        actor = "" if isinstance(job.actor, str) else _directory(job.actor.model)
    update: dict[str, Any] = {"policy": job.policy.model_copy(update={"model": policy})}
    if not isinstance(job.actor, str):
        update["actor"] = job.actor.model_copy(update={"model": actor})
    return job.model_copy(update=update)


def _directory(model: str) -> str:
    return str(resolve_builtin(model)) if model.startswith("builtin:") else model


def _run(request: Mapping[str, Any]) -> Run:
    recipe = None if request["recipe"] is None else Recipe.of_settings(request["recipe"])
    return Run(parse_job(request["job"]), recipe, request["execution"], request["staleness"], request["reference_age"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
