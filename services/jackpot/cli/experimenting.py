"""The command that runs studies: experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(experiment)


def experiment(
    study_file: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study file.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Results and figures; the report is DIR.md. Default: beside the file."
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes at a time; each uses one core.")] = 1,
    phase: Annotated[
        list[str] | None, typer.Option("--phase", help="Only this phase; may be given several times.")
    ] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Write the report; run nothing.")] = False,
) -> None:
    """Run a study: arms × seeds, with resume; means, intervals, a Markdown report with figures.

    A finished run is never repeated, neither after a crash nor when arms or seeds are added. A changed setting makes it
    a different run.
    """
    from jackpot.experiment.report import write_report
    from jackpot.experiment.runner import run_study, stored_study
    from jackpot.experiment.study import load_study

    study = load_study(study_file)
    directory = out or study_file.with_suffix("")
    console = Console(stderr=True)
    results = (
        stored_study(study, directory) if report_only else run_study(study, directory, workers, console, phase or ())
    )
    typer.echo(write_report(study, results, directory))
