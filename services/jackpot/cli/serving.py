"""Commands for operators of a server: serve, token."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_DATA_DIR = "~/.local/share/jackpot"

DataDir = Annotated[
    Path,
    typer.Option("--data-dir", envvar="JACKPOT_DATA_DIR", help="Jobs, their files, and tokens."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_tokens = typer.Typer(no_args_is_help=True, help="Create, list and revoke the tokens of a server.")


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(serve)
    app.add_typer(_tokens, name="token")


def serve(
    data_dir: DataDir = Path(DEFAULT_DATA_DIR),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8700,
    slots: Annotated[int, typer.Option(min=0, help="Jobs that run at the same time; 0 only queues.")] = 1,
    max_losses: Annotated[int, typer.Option(min=0, help="How often a lost job is resumed.")] = 3,
    store: Annotated[
        str | None, typer.Option(envvar="JACKPOT_STORE_URL", help="Redis or Valkey for the jobs; embedded without it.")
    ] = None,
    redis_tls: Annotated[
        Path | None,
        typer.Option(envvar="JACKPOT_TLS_DIR", help="Directory of ca.crt, and tls.crt and tls.key, for rediss://."),
    ] = None,
    require_token: Annotated[bool, typer.Option(help="Require tokens. Always on once a token was made.")] = False,
    token_file: Annotated[
        Path | None, typer.Option(help="The tokens' file, if not in the data directory; it may be read-only.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="TLS certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    tls_elsewhere: Annotated[bool, typer.Option(help="A proxy in front of the server speaks TLS.")] = False,
    allowed_host: Annotated[list[str] | None, typer.Option(help="A name of the server, besides its address.")] = None,
    allow_task: Annotated[
        list[str] | None, typer.Option(help="A task that jobs may name, besides the built-in ones; * is a wildcard.")
    ] = None,
    root: Annotated[
        list[Path] | None, typer.Option(help="Directory that models and data may lie in; anywhere if only local.")
    ] = None,
    launcher: Annotated[
        str, typer.Option(help="Where jobs run: local (processes on this machine) or kubernetes (a JobSet per job).")
    ] = "local",
    cluster: Annotated[
        Path | None, typer.Option(help="Settings of the cluster, for --launcher kubernetes; the Helm chart makes them.")
    ] = None,
    weight_store: Annotated[
        str | None,
        typer.Option(help="s3://bucket/prefix for the weights and checkpoints of jobs; needs AWS_* variables."),
    ] = None,
    rate_limit: Annotated[float, typer.Option(min=0, help="Requests per second and client; 0 is no limit.")] = 100.0,
) -> None:
    """Serve the REST API and the web page. Jobs survive a restart of the server."""
    from jackpot.config.environment import redis_url_over_tls
    from jackpot.control_plane.jobs.admission import DEFAULT_TASKS, Admission
    from jackpot.control_plane.jobs.scheduler import SchedulingPolicy
    from jackpot.control_plane.launch.launcher_choice import LauncherChoice
    from jackpot.control_plane.serve import serve as serve_until_stopped
    from jackpot.control_plane.settings import ServeSettings
    from jackpot.control_plane.tokens import TokenFile
    from jackpot.errors import ConfigError

    if (launcher == "kubernetes") != (cluster is not None) or launcher not in ("local", "kubernetes"):
        raise ConfigError("--launcher", launcher, "does not go with --cluster", "Give both, or neither.")
    launcher_choice = LauncherChoice(cluster.resolve() if cluster else None, store if cluster else None)
    directory = data_dir.expanduser().resolve()
    settings = ServeSettings(
        data_dir=directory,
        host=host,
        port=port,
        store_url=store and redis_url_over_tls(store, str(redis_tls or "")),
        # A named file that does not exist yet requires tokens, too, so that a typo cannot open the server.
        token_required=require_token or token_file is not None or TokenFile(directory / "tokens.json").exists,
        token_file=token_file,
        tls_certificate=tls_cert,
        tls_key=tls_key,
        tls_elsewhere=tls_elsewhere,
        allowed_hosts=tuple(allowed_host or ()),
        admission=Admission(tasks=(*DEFAULT_TASKS, *(allow_task or ())), weight_store=_bucket(weight_store)),
        launcher_choice=launcher_choice,
        policy=SchedulingPolicy(slots=slots, max_losses=max_losses, stop_seconds=launcher_choice.stop_seconds),
        requests_per_second=rate_limit,
        burst=max(1, int(rate_limit * 3)),
    ).with_roots(root)
    # A store's address may hold a password, so that jobs' processes do not inherit it.
    os.environ.pop("JACKPOT_STORE_URL", None)
    serve_until_stopped(settings, _announce)


def _bucket(url: str | None) -> str | None:
    """The address of a weight store, checked as a job's.

    Raises:
        ConfigError: it is not valid.
    """
    from pydantic import ValidationError

    from jackpot.config import WeightStoreConfig
    from jackpot.errors import ConfigError

    try:
        return WeightStoreConfig(store=url).store
    except ValidationError as error:
        problem, _, remedy = error.errors()[0]["msg"].removeprefix("Value error, ").rpartition(". ")
        raise ConfigError("--weight-store", url, problem, f"{remedy}.") from None


def _announce(url: str) -> None:
    typer.echo(f"jackpot serves at {url} (stop it with Ctrl-C; running jobs continue)")


@_tokens.command("create")
def create_token(
    name: Annotated[str, typer.Option(help="Its owner or purpose.")] = "default",
    scope: Annotated[str, typer.Option(help="read, write or admin; each includes the ones before.")] = "write",
    expires: Annotated[str, typer.Option(help="e.g. 12h, 30d, or never.")] = "30d",
    data_dir: DataDir = Path(DEFAULT_DATA_DIR),
    as_json: Json = False,
) -> None:
    """Make a token and print it. It is shown only now; the server keeps a hash."""
    from jackpot.control_plane.tokens import Scope, TokenFile, parse_lifetime

    file = TokenFile(data_dir.expanduser() / "tokens.json")
    first = not file.exists
    token = file.create(name, Scope.of(scope), parse_lifetime(expires))
    typer.echo(json.dumps({"token": token, "name": name, "scope": scope, "expires": expires}) if as_json else token)
    if first:
        typer.echo("From its next start the server requires tokens. Use it: export JACKPOT_TOKEN=…", err=True)


@_tokens.command("list")
def list_tokens(data_dir: DataDir = Path(DEFAULT_DATA_DIR), as_json: Json = False) -> None:
    """List the tokens' records, without the tokens themselves."""
    from jackpot.control_plane.tokens import TokenFile, without_hash

    tokens = [without_hash(record) for record in TokenFile(data_dir.expanduser() / "tokens.json").list()]
    if as_json:
        typer.echo(json.dumps(tokens))
        return
    for token in tokens:
        end = "expired" if token["expired"] else f"until {token['expires'] or 'revoked'}"
        typer.echo(f"{token['id']}  {token['scope']:<6} {end:<40} {token['name']}")


@_tokens.command("revoke")
def revoke_token(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="As in `jackpot token list`.")],
    data_dir: DataDir = Path(DEFAULT_DATA_DIR),
) -> None:
    """Revoke a token at once."""
    from jackpot.control_plane.tokens import TokenFile

    record = TokenFile(data_dir.expanduser() / "tokens.json").revoke(token_id)
    typer.echo(f"revoked {record.id} ({record.name})")
