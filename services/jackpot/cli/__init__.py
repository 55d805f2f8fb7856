"""The `jackpot` command. Exit codes: 0 success, 1 failed, 2 configuration or refused input, 130 stopped or cancelled.

Each module adds a group of commands. Heavy imports happen inside the commands, so that --help is fast.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import jackpot
from jackpot.cli import experimenting, local, planning, remote, replaying, serving
from jackpot.errors import JackpotError
from jackpot.telemetry.logs import redact_url

INSTALL = "This command needs more than the base package: pip install 'jackpot[local]'."

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Reinforcement learning with rollouts from a cheaper model than the one being trained.",
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"jackpot {jackpot.__version__}")
        raise typer.Exit


for _commands in (local, replaying, experimenting, serving, remote, planning):
    _commands.add_to(app)


def main() -> None:
    """Run the command line; errors are one line each, with the exit code of their kind."""
    try:
        app()
    except JackpotError as error:
        typer.echo(f"error: {redact_url(str(error))}", err=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "jackpot":
            raise
        typer.echo(f"error: {error.name} is not installed. {INSTALL}", err=True)
        sys.exit(1)
    except OSError as error:  # a full disk, a directory without permission: the system's message is enough
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
