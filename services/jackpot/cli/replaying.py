"""Commands that re-examine finished runs: replay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from jackpot.algorithm.corrections import CORRECTIONS
from jackpot.process.children import ending_with_us


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(replay)


def replay(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run that kept trajectories.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="e.g. algorithm.correction.c1=2")
    ] = None,
    correction: Annotated[str | None, typer.Option(help=f"{', '.join(CORRECTIONS)}; default: the run's own.")] = None,
    lambdas: Annotated[
        list[float] | None, typer.Option("--lambda", help="A λ to try; repeatable. Default: 0.25, 0.5, 1, 2, 4.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Weights, acceptance and diagnostics of a run's last batches under other settings: the tool for choosing λ."""
    arguments = [str(run_dir), *(overrides or []), *(f"--lambda={each}" for each in lambdas or [])]
    arguments += ["--json"] if as_json else []
    arguments += [f"--correction={correction}"] if correction is not None else []
    # In a separate process: it needs torch, which no command of this program loads.
    command = ending_with_us([sys.executable, "-m", "jackpot.replay", *arguments])
    code = subprocess.run(command, check=False).returncode
    raise typer.Exit(code)
