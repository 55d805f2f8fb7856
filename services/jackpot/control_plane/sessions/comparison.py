"""The same job under several corrections, one after the other on the same seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jackpot.algorithm.corrections import CORRECTIONS
from jackpot.config import JobSpec, load_job
from jackpot.control_plane.observing.curves import draw_comparison
from jackpot.control_plane.sessions.job_run import run_job
from jackpot.control_plane.sessions.preparation import prepare_job
from jackpot.storage.run_directory import RunDirectory, new_job_id


def methods(job_correction: str) -> dict[str, tuple[str, ...]]:
    """How the runs differ, as overrides of the job file; everything else is the same.

    Args:
        own: the correction that the job file asks for, which keeps its settings and comes last.
    """
    compared = [
        name for name, correction in CORRECTIONS.items() if correction.compared_in_demo and name != job_correction
    ]
    return {
        "on-policy": ("actor=policy", "algorithm.correction=none"),
        **{name: (f"algorithm.correction={name}",) for name in compared},
        job_correction: (),
    }


def compare(job_file: Path, overrides: Sequence[str], directory: Path, console: Console) -> dict[str, Any]:
    """Run every one of :func:`methods`; writes ``comparison.json`` and ``comparison.png``, and returns the former.

    Stops at the first run that does not succeed.

    Raises:
        ConfigError: the job cannot work.
        JackpotError: a run could not be started.
    """
    job_correction = load_job(job_file, overrides).algorithm.correction.name
    jobs: dict[str, JobSpec] = {
        method: prepare_job(load_job(job_file, [*overrides, *changes]))
        for method, changes in methods(job_correction).items()
    }
    runs: dict[str, RunDirectory] = {}
    results: dict[str, dict[str, Any]] = {}
    for method, job in jobs.items():
        console.print(f"── {method} ──", highlight=False)
        job_id = new_job_id(f"{job.name}-{method}")
        run = RunDirectory.create(directory / method, job_id, job)
        results[method] = run_job(run, job, console, resumed=False)
        runs[method] = run
        if results[method]["state"] != "succeeded":
            break
    comparison = {"seed": next(iter(jobs.values())).seed, "directory": str(directory), "runs": results}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "comparison.json").write_text(json.dumps(comparison, indent=2) + "\n", encoding="utf-8")
    draw_comparison(runs, directory / "comparison.png", f"{next(iter(jobs.values())).name}, seed {comparison['seed']}")
    return comparison


def comparison_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """The runs side by side."""
    table = Table(title="policy accuracy on held-out prompts")
    for heading in ("method", "initial", "final", "best", "acceptance", "KL policy‖actor at the end", "seconds"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for method, summary in results.items():
        accuracy = summary["policy_accuracy"]
        figures = [accuracy["initial"], accuracy["final"], accuracy["best"], summary["acceptance_rate"]]
        figures.append(summary["kl_policy_actor"]["final"])
        cells = ["–" if figure is None else f"{figure:.3f}" for figure in figures]
        table.add_row(method, *cells, f"{summary['wall_seconds']:.0f}")
    return table
