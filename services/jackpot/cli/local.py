"""Commands that need no server: run, demo, validate, schema."""

from __future__ import annotations

import importlib.util
import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jackpot.config import job_json_schema, load_job
from jackpot.errors import ConfigError

EXIT_CODES = {"succeeded": 0, "failed": 1, "stopped": 130}

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="e.g. learner.lr=1e-3")]
Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON, as the last line.")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="The run directory; default runs/<job id>.")]


def run(
    job_file: Annotated[Path | None, typer.Argument(metavar="JOB.yaml", help="The job file.")] = None,
    overrides: Overrides = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="DIR", help="Continue this run.")] = None,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Run a job on this machine: every process, from the embedded server to the learner."""
    if resume is not None:
        if job_file is not None or run_dir is not None:
            raise ConfigError("--resume", str(resume), "takes no job file", "The run directory has its own job.")
        _resume(resume, as_json)
    elif job_file is None:
        raise ConfigError("JOB.yaml", None, "is missing", "Name a job file, or continue a run with --resume DIR.")
    else:
        _run_file(job_file, overrides or [], run_dir, as_json)


def demo(
    overrides: Overrides = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="On-policy, none, tis and jackpot on the same seed, in one figure.")
    ] = False,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Run examples/demo.yaml: two tiny models learn to subtract, with no GPU and no download."""
    with as_file(files("jackpot.demo") / "demo.yaml") as path:
        if compare:
            _compare(path, overrides or [], run_dir, as_json)
        else:
            _run_file(path, overrides or [], run_dir, as_json)


def validate(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")], overrides: Overrides = None
) -> None:
    """Check a job file and everything that it names, without starting anything."""
    from jackpot.control_plane.sessions.model_directories import report_vocabulary
    from jackpot.control_plane.sessions.preparation import prepare_models
    from jackpot.orchestrator.preflight import validate_job
    from jackpot.orchestrator.task_report import report_task

    job = prepare_models(load_job(job_file, overrides or []))
    for line in [*report_vocabulary(job), *report_task(job, validate_job(job))]:
        typer.echo(line)
    typer.echo(f"{job_file} is a valid job")


def schema() -> None:
    """Print the JSON Schema of the job file, for editors."""
    typer.echo(json.dumps(job_json_schema(), indent=2))


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (run, demo, validate, schema):
        app.command()(command)


def _run_file(job_file: Path, overrides: list[str], run_dir: Path | None, as_json: bool) -> None:
    from jackpot.control_plane.sessions.job_run import run_job
    from jackpot.control_plane.sessions.preparation import prepare_job
    from jackpot.storage.run_directory import RunDirectory, new_job_id

    _require_services()
    job = prepare_job(load_job(job_file, overrides))
    job_id = new_job_id(job.name)
    directory = run_dir or Path(job.run.directory or Path("runs") / job_id)
    directory_of_run = RunDirectory.create(directory, job_id, job)
    _finish(run_job(directory_of_run, job, _console(as_json), resumed=False), directory_of_run.path, as_json)


def _resume(directory: Path, as_json: bool) -> None:
    from jackpot.control_plane.sessions.job_run import run_job
    from jackpot.storage.run_directory import RunDirectory
    from jackpot.storage.run_records import read_summary

    _require_services()
    run_directory = RunDirectory.open(directory)
    summary = read_summary(run_directory.files)
    if summary is not None and summary.get("state") == "succeeded":
        raise ConfigError("--resume", str(directory), "has finished already", "Start a new run.")
    job = run_directory.load_job()
    _finish(run_job(run_directory, job, _console(as_json), resumed=True), run_directory.path, as_json)


def _compare(job_file: Path, overrides: list[str], run_dir: Path | None, as_json: bool) -> None:
    from jackpot.control_plane.sessions.comparison import compare, comparison_table
    from jackpot.storage.run_directory import new_job_id

    _require_services()
    console = _console(as_json)
    directory = run_dir or Path("runs") / new_job_id("compare")
    comparison = compare(job_file, overrides, directory, console)
    console.print(comparison_table(comparison["runs"]))
    console.print(f"picture: {directory / 'comparison.png'}", highlight=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(comparison))
    worst = max(EXIT_CODES[summary["state"]] for summary in comparison["runs"].values())
    raise typer.Exit(worst)


def _require_services() -> None:
    """Check packages that only the service processes import: a missing one would show only in their logs."""
    for name in ("torch", "transformers", "safetensors", "psutil", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _finish(summary: dict[str, Any], directory: Path, as_json: bool) -> None:
    from jackpot.storage.run_directory import RunFiles

    console = _console(as_json)
    accuracy, divergence, ledger = summary["policy_accuracy"], summary["kl_policy_actor"], summary["ledger"]
    files = RunFiles(directory)
    places = [files.summary, *((files.curves, files.export) if summary["state"] == "succeeded" else (files.logs,))]
    lines = [
        f"{summary['state']} after {summary['steps']} steps in {summary['wall_seconds']:.0f} s",
        f"policy accuracy  {_with_error(accuracy, 'initial')} → {_with_error(accuracy, 'final')} on held-out prompts"
        + (f"; {accuracy['not_comparable']} evaluations with failed rewards" if accuracy["not_comparable"] else ""),
        f"acceptance rate  {_figure(summary['acceptance_rate'])} on average",
        f"KL policy‖actor  {_figure(divergence['initial'])} → {_figure(divergence['final'])} nats per token",
        f"ledger           {ledger['dispatched']} groups dispatched, {ledger['trained']} trained, "
        f"dropped {ledger['dropped'] or 'none'}; {summary['restarts']} restarts",
        *_loss_lines(summary),
        *_busy_lines(summary["services"]),
        f"everything is in {directory} ({', '.join(path.name for path in places)})",
    ]
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if summary["state"] == "stopped":
        console.print(f"resume with: jackpot run --resume {directory}", highlight=False, soft_wrap=True, markup=False)
    if "error" in summary:
        typer.echo(f"error: {summary['error']}", err=True)
    if as_json:
        typer.echo(json.dumps(summary))
    raise typer.Exit(EXIT_CODES[summary["state"]])


def _loss_lines(summary: dict[str, Any]) -> list[str]:
    """What failures kept from training, by cause: a bias of what the policy learned from."""
    from jackpot.control_plane.sessions.summary import lost_to_failures
    from jackpot.storage.run_directory import RunFiles

    lost = lost_to_failures(summary["ledger"])
    lines = []
    if lost:
        shares = ", ".join(f"{reason} {share:.1%}" for reason, share in lost.items())
        lines.append(f"bias             groups that failures kept from training: {shares} of those dispatched")
    if failures := summary["reward_failures"]:
        lines.append(f"reward failures  {failures} completions: {RunFiles(Path()).reward_failures.name} names each")
    return lines


def _with_error(accuracy: dict[str, Any], when: str) -> str:
    error = accuracy[f"{when}_stderr"]
    return _figure(accuracy[when]) + ("" if error is None else f" ± {error:.3f}")


def _busy_lines(services: dict[str, dict[str, Any]]) -> list[str]:
    """How busy each service was, and what took most of its remaining time."""
    lines = []
    for name, shares in services.items():
        most = sorted(((share, what) for what, share in shares["others"].items() if share >= 0.01), reverse=True)[:2]
        rest = ", ".join(f"{what.replace('_', ' ')} {share:.0%}" for share, what in most)
        busy = "" if shares["busy"] is None else f"busy {shares['busy']:.0%}"
        lines.append(f"{name:<16} {'; '.join(filter(None, (busy, rest)))}")
    return lines


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _console(as_json: bool) -> Console:
    # With --json, stdout carries only the JSON; output for people goes to stderr.
    return Console(stderr=as_json)
