"""The `jackpot` command."""

from __future__ import annotations

import json
import sys

import typer

from jackpot.config import job_json_schema
from jackpot.errors import JackpotError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reinforcement learning with rollouts from a cheaper model.",
)


@app.callback()
def _root() -> None:
    """Reinforcement learning with rollouts from a cheaper model."""


@app.command()
def schema() -> None:
    """Print the JSON Schema of the job file, for editors."""
    typer.echo(json.dumps(job_json_schema(), indent=2))


def main() -> None:
    """Run the command line; errors are one line each, with the exit code of their kind."""
    try:
        app()
    except JackpotError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
