"""Commands that talk to a server: submit, jobs, show, watch, logs, cancel, resume, scale, delete, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jackpot.errors import ApiError, ConfigError, JackpotError

if TYPE_CHECKING:
    from jackpot.client import Client, Event
    from jackpot.control_plane.jobs.records import JobRecord

EXIT_CODES = {"succeeded": 0, "failed": 1, "cancelled": 130}


def _known_jobs(incomplete: str) -> list[str]:
    """Job ids for shell completion; none if no server answers."""
    from jackpot.client import Client

    try:
        with Client() as client:
            job_ids = (job.id for job, _ in zip(client.jobs(), range(100), strict=False))
            return [job_id for job_id in job_ids if job_id.startswith(incomplete)]
    except JackpotError:
        return []


Url = Annotated[str | None, typer.Option("--url", envvar="JACKPOT_URL", help="The server.")]
Ca = Annotated[Path | None, typer.Option("--ca", envvar="JACKPOT_CA", help="PEM file of its certificate authority.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.", autocompletion=_known_jobs)]
Labels = Annotated[list[str] | None, typer.Option("--label", "-l", help="key=value; may be given several times.")]

_checkpoints = typer.Typer(no_args_is_help=True, help="List and download a job's checkpoints.")


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (submit, jobs, show, watch, logs, cancel, resume, scale, delete):
        app.command()(command)
    app.add_typer(_checkpoints, name="checkpoints")


def submit(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="e.g. learner.lr=1e-3")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow it to its end; exit as it ends.")] = False,
    priority: Annotated[int, typer.Option(help="Greater starts earlier.")] = 0,
    label: Labels = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check it; start nothing.")] = False,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Repeating it with the same key makes no second job.")
    ] = None,
    url: Url = None,
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Submit a job to a server. Relative paths in the job file are resolved from its directory."""
    from jackpot.config import load_job

    job = load_job(job_file, overrides or []).model_dump(mode="json", exclude_unset=True)
    with _client(url, ca) as client:
        if dry_run:
            answer = client.check(job)
            _print(answer, as_json, "\n".join([f"{job_file} is a valid job", *answer["notes"]]))
            return
        record = client.submit(job, priority=priority, labels=_labels(label), idempotency_key=idempotency_key)
        if not follow:
            _print(record.model_dump(mode="json"), as_json, record.id)
            return
        typer.echo(f"{record.id} is {record.state}", err=as_json)
        _follow(client, record.id, as_json)


def jobs(
    state: Annotated[list[str] | None, typer.Option("--state", "-s", help="Only in this state.")] = None,
    label: Labels = None,
    limit: Annotated[int, typer.Option(min=1, help="Most jobs to show.")] = 50,
    url: Url = None,
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """List the jobs, newest first."""
    with _client(url, ca) as client:
        known_jobs = client.jobs(states=state or (), labels=_labels(label))
        rows = [job for job, _ in zip(known_jobs, range(limit), strict=False)]
    if as_json:
        typer.echo(json.dumps([job.model_dump(mode="json") for job in rows]))
        return
    for job in rows:
        accuracy = "" if job.progress.policy_accuracy is None else f"accuracy {job.progress.policy_accuracy:.3f}"
        labels = ",".join(f"{key}={value}" for key, value in job.labels.items())
        typer.echo(f"{job.id:<42} {job.state:<10} {_steps(job):>11}  {accuracy:<15} {labels}".rstrip())


def show(job_id: JobId, url: Url = None, ca: Ca = None, as_json: Json = False) -> None:
    """Show a job: state, history, ledger."""
    with _client(url, ca) as client:
        job, ledger = client.job(job_id), client.ledger(job_id)
    lines = [f"{job.id} is {job.state}: {job.reason}"]
    lines += [f"error     {job.error}"] if job.error else []
    lines += [f"steps     {_steps(job)}"]
    if job.progress.policy_accuracy is not None:
        lines.append(f"accuracy  {job.progress.policy_accuracy:.3f} on held-out prompts")
    lines.append(f"ledger    {ledger['trained']} groups trained, dropped {ledger['dropped'] or 'none'}")
    lines += [f"{step.time:%Y-%m-%d %H:%M:%S}  {step.state}: {step.reason}" for step in job.transitions]
    _print(job.model_dump(mode="json") | {"ledger": ledger}, as_json, "\n".join(lines))


def watch(job_id: JobId, url: Url = None, ca: Ca = None, as_json: Json = False) -> None:
    """Follow a job to its end. The exit code is 0 if it succeeds, 1 if it fails, 130 if it is cancelled."""
    with _client(url, ca) as client:
        _follow(client, job_id, as_json)


def logs(
    job_id: JobId,
    service: Annotated[str | None, typer.Option("--service", help="Only this process, e.g. learner.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job is over.")] = False,
    tail: Annotated[int, typer.Option(min=0, help="Begin with this many lines of each log.")] = 200,
    url: Url = None,
    ca: Ca = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Print the logs of a job's processes."""
    with _client(url, ca) as client:
        for line in client.logs(job_id, service, follow=follow, tail=tail):
            typer.echo(json.dumps({"line": line}) if as_json else line)


def cancel(job_id: JobId, url: Url = None, ca: Ca = None, as_json: Json = False) -> None:
    """Stop a job. It can be resumed from its last checkpoint."""
    with _client(url, ca) as client:
        _print_state(client.cancel(job_id), as_json)


def resume(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow it to its end.")] = False,
    url: Url = None,
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Resume a failed or cancelled job from its last checkpoint."""
    with _client(url, ca) as client:
        # Events before this one have been shown already.
        seen = len(client.job(job_id).transitions)
        record = client.resume(job_id)
        if follow:
            _follow(client, job_id, as_json, f"{seen}-0-0-0-0")
        else:
            _print_state(record, as_json)


def scale(
    job: Annotated[str, typer.Argument(metavar="JOB|DIR", help="The job's id, or the directory of `jackpot run`.")],
    replicas: Annotated[int, typer.Argument(metavar="N", help="Rollout replicas from now on.")],
    url: Url = None,
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Change how many rollout replicas a running job has."""
    told = f"{job}: {replicas} rollout replica{'' if replicas == 1 else 's'} wanted"
    if Path(job).is_dir():
        from jackpot.control_plane.sessions.scaling import request_scale
        from jackpot.storage.run_directory import RunDirectory

        request_scale(RunDirectory.open(Path(job), "JOB|DIR"), replicas)
        _print({"job_id": Path(job).name, "rollout_replicas": replicas}, as_json, told)
        return
    with _client(url, ca) as client:
        detail = client.scale(job, replicas)
    _print(detail.model_dump(mode="json"), as_json, told)


def delete(job_id: JobId, url: Url = None, ca: Ca = None, as_json: Json = False) -> None:
    """Delete a finished job, with everything that it has written."""
    with _client(url, ca) as client:
        client.delete(job_id)
    _print({"deleted": job_id}, as_json, f"deleted {job_id}")


@_checkpoints.command("list")
def list_checkpoints(job_id: JobId, url: Url = None, ca: Ca = None, as_json: Json = False) -> None:
    """List the checkpoints of a job."""
    with _client(url, ca) as client:
        checkpoints = client.checkpoints(job_id)
    lines = [
        f"{checkpoint['name']:<10} {', '.join(checkpoint['roles'])}{'  latest' if checkpoint['latest'] else ''}"
        for checkpoint in checkpoints
    ]
    _print(checkpoints, as_json, "\n".join(lines) or "none yet")


@_checkpoints.command("pull")
def pull(
    job_id: JobId,
    name: Annotated[str | None, typer.Argument(help="As in the list, or latest; default export, else latest.")] = None,
    role: Annotated[str, typer.Option(help="policy or actor.")] = "policy",
    to: Annotated[Path | None, typer.Option("--to", help="A new directory for it.")] = None,
    url: Url = None,
    ca: Ca = None,
    as_json: Json = False,
) -> None:
    """Download a checkpoint as a directory that transformers loads."""
    with _client(url, ca) as client:
        if name is None:
            checkpoints = client.checkpoints(job_id)
            if not checkpoints:
                raise ApiError(f"{job_id} has no checkpoint yet; see `jackpot show {job_id}`", 404)
            name = str(checkpoints[-1]["name"])  # the export, if there is one
            if name != "export":
                name = next((str(checkpoint["name"]) for checkpoint in checkpoints if checkpoint["latest"]), name)
        directory = client.pull(job_id, name, to or Path(f"{job_id}-{name}-{role}"), role)
    _print({"directory": str(directory), "checkpoint": name, "role": role}, as_json, str(directory))


@contextmanager
def _client(url: str | None, ca: Path | None) -> Iterator[Client]:
    from jackpot.client import Client

    if ca is not None and not ca.is_file():
        raise ConfigError("--ca", str(ca), "is not a file", "Give a PEM file.")
    with Client(url, ca=ca) as client:
        yield client


def _follow(client: Client, job_id: str, as_json: bool, last_event_id: str | None = None) -> None:
    total = client.job(job_id).steps
    try:
        for event in client.events(job_id, last_event_id):
            if as_json:
                typer.echo(json.dumps({"event": event.name, **event.data}))
            elif line := _told(event, total):
                typer.echo(line)
    except KeyboardInterrupt:
        typer.echo(f"\n{job_id} keeps running; follow it again with: jackpot watch {job_id}", err=True)
        raise typer.Exit(130) from None
    job = client.job(job_id)
    if job.error:
        typer.echo(f"error: {job.error}", err=True)
    raise typer.Exit(EXIT_CODES.get(job.state, 1))


def _told(event: Event, total: int) -> str | None:
    data = event.data
    if event.name == "state":
        return f"{data['state']}: {data['reason']}"
    if event.name == "evaluation":
        return f"step {data['step']:>5}/{total}  policy accuracy {data['policy_accuracy']:.3f} on held-out prompts"
    if event.name == "alarm":
        return f"step {data['step']:>5}/{total}  alarm: {data['message']}"
    if event.name == "scale":
        failed = "" if data["error"] is None else f" failed: {data['error']}"
        return f"rollout replicas: {data['before']} → {data['rollout_replicas']}{failed}"
    if event.name == "step":
        figures = {"reward": "reward/mean", "acceptance": "rollout_corr/obrs_acceptance_rate", "KL": "kl/policy_actor"}
        shown = (f"{name} {data[key]:.3f}" for name, key in figures.items() if data.get(key) is not None)
        return f"step {data['step']:>5}/{total}  {'  '.join(shown)}"
    return None


def _labels(texts: list[str] | None) -> dict[str, str]:
    labels = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError("--label", text, "is not of the form key=value", "Write e.g. --label team=math.")
        labels[key] = value
    return labels


def _steps(job: JobRecord) -> str:
    return f"{job.progress.step}/{job.steps}"


def _print_state(record: JobRecord, as_json: bool) -> None:
    _print(record.model_dump(mode="json"), as_json, f"{record.id} is {record.state}: {record.reason}")


def _print(content: Any, as_json: bool, text: str) -> None:
    typer.echo(json.dumps(content) if as_json else text)
