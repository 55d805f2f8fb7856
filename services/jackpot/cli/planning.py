"""Commands that compute and start nothing: plan."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from jackpot.config import load_job

if TYPE_CHECKING:
    from jackpot.planning.plan import Plan


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(plan)


def plan(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…")] = None,
    policy: Annotated[
        str | None, typer.Option(help="Plan for this policy in bfloat16: a directory, config.json or qwen3-8b etc.")
    ] = None,
    actor: Annotated[str | None, typer.Option(help="Likewise for the actor.")] = None,
    gpu: Annotated[str, typer.Option(help="a100, l40s, h100, h200 or b200.")] = "h100",
    prompt_tokens: Annotated[float, typer.Option(min=1, help="Mean length of a prompt.")] = 512,
    completion_tokens: Annotated[
        float | None, typer.Option(min=1, help="Mean length of a completion; default sampling.max_tokens.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Trajectories decoded together; default rollout.max_batch_size.")
    ] = None,
    rollout_share: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of an on-policy step spent sampling; default: computed.")
    ] = None,
    training_utilization: Annotated[float | None, typer.Option(min=0.01, max=1)] = None,
    scoring_utilization: Annotated[float | None, typer.Option(min=0.01, max=1)] = None,
    decoding_utilization: Annotated[float | None, typer.Option(min=0.01, max=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Memory, arithmetic, bytes, bottleneck and expected gain of a job, computed from its models' sizes."""
    from jackpot.control_plane.sessions.preparation import resolve_models
    from jackpot.planning.hardware import Utilization, gpu_named
    from jackpot.planning.model_shape import read_shape
    from jackpot.planning.plan import Load, make_plan, with_models

    job = resolve_models(with_models(load_job(job_file, overrides or []), policy, actor))
    given = {"training": training_utilization, "scoring": scoring_utilization, "decoding": decoding_utilization}
    load = Load(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens or job.sampling.max_tokens,
        concurrency=concurrency or job.rollout.max_batch_size,
        gpu=gpu_named(gpu),
        utilization=replace(Utilization(), **{name: value for name, value in given.items() if value is not None}),
        rollout_share=rollout_share,
    )
    policy_shape = read_shape("policy.model", job.policy.model)
    result = make_plan(job, policy_shape, read_shape("actor.model", job.rollout_model.model), load)
    if as_json:
        typer.echo(json.dumps(asdict(result)))
    else:
        _print(result, gpu, load.prompt_tokens, load.completion_tokens)


def _print(plan: Plan, gpu: str, prompt_tokens: float, completion_tokens: float) -> None:
    console = Console()

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    line(
        f"policy {plan.policy_parameters / 1e9:.2f} B parameters, actor {plan.actor_parameters / 1e9:.2f} B; "
        f"{plan.tokens_per_step:,.0f} completion tokens a step; prompts of {prompt_tokens:.0f}, completions of "
        f"{completion_tokens:.0f} tokens on {gpu}. All figures are computed."
    )
    table = Table("GFLOP", "a token", "a step")
    for name, per_token in asdict(plan.flops_per_token).items():
        table.add_row(
            name.replace("_", " "), f"{per_token / 1e9:,.3g}", f"{getattr(plan.flops_per_step, name) / 1e9:,.3g}"
        )
    console.print(table)
    table = Table("memory of one GPU", "GB", "of which")
    for service, parts in plan.memory_bytes.items():
        shown = ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.3g}" for name, size in parts.items())
        table.add_row(service, f"{sum(parts.values()) / 1e9:.3g}", shown)
    console.print(table)
    for title, sizes in (
        ("host memory of a learner's process", plan.learner_host_bytes),
        ("host memory of a scorer", plan.scorer_host_bytes),
        ("bus, a step", plan.bus_bytes_per_step),
        ("weights, a version", plan.weight_bytes_per_version),
    ):
        shown = ", ".join(f"{name.replace('_', ' ')} {_bytes(size)}" for name, size in sizes.items())
        if sizes:
            line(f"{title}: {shown}")
    seconds = ", ".join(f"{name} {value:.3g} s" for name, value in asdict(plan.step_seconds).items())
    line(f"time of a step: {seconds}; the bottleneck is the {plan.bottleneck}")
    line(
        f"expected gain over on-policy training: {plan.gain:.2f}× of GPU time, where sampling is "
        f"{plan.on_policy_rollout_share:.0%} of an on-policy step"
    )
    for warning in plan.warnings:
        line(f"warning: {warning}")


def _bytes(size: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.3g} kB"
