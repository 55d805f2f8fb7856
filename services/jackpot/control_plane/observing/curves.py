"""Plots of runs. matplotlib is imported only when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jackpot.storage.json_files import Row
from jackpot.storage.run_directory import RunDirectory
from jackpot.storage.run_records import read_evaluations, read_steps

# Distinguishable with colour blindness, too (Okabe and Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw_run(run: RunDirectory, path: Path) -> None:
    """Draw one run's curves: accuracy and reward, acceptance and Z, divergence, weights and staleness."""
    steps, evaluations = read_steps(run.files), read_evaluations(run.files)
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6.5), constrained_layout=True)
    figure.suptitle(run.job_id)
    _plot(axes[0][0], "policy accuracy and reward", [
        ("policy accuracy (held out, own samples)", evaluations, "policy_accuracy"),
        ("mean reward (actor's samples)", steps, "reward/mean"),
    ])  # fmt: skip
    axes[0][0].set_ylim(-0.02, 1.02)
    _plot(axes[0][1], "acceptance", [
        ("acceptance rate", steps, "rollout_corr/obrs_acceptance_rate"),
        ("normalizer Z", steps, "rollout_corr/obrs_normalizer"),
        ("target mass in top-k", steps, "rollout_corr/obrs_topk_mass"),
    ])  # fmt: skip
    _plot(axes[1][0], "divergence, nats per token", [
        ("KL(policy ‖ actor)", steps, "kl/policy_actor"),
        ("E[log p_inf − log p_ref]", steps, "rollout_corr/kl"),
    ])  # fmt: skip
    _plot(axes[1][1], "weights and staleness", [
        ("effective sample size", steps, "rollout_corr/rollout_is_eff_sample_size"),
        ("staleness, steps", steps, "staleness/mean"),
    ])  # fmt: skip
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_comparison(runs: Mapping[str, RunDirectory], path: Path, title: str) -> None:
    """Draw several runs into one figure: the policy's accuracy, and the actor's distance from it."""
    pyplot = _pyplot()
    figure, (accuracy, divergence) = pyplot.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    figure.suptitle(title)
    _plot(accuracy, "policy accuracy (held out, own samples)", [
        (name, read_evaluations(run.files), "policy_accuracy") for name, run in runs.items()
    ])  # fmt: skip
    accuracy.set_ylim(-0.02, 1.02)
    _plot(divergence, "KL(policy ‖ actor), nats per token", [
        (name, read_steps(run.files), "kl/policy_actor") for name, run in runs.items()
    ])  # fmt: skip
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot(axis: Any, title: str, curves: Sequence[tuple[str, Sequence[Row], str]]) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("optimizer step")
    axis.grid(alpha=0.3)
    for color, (label, rows, column) in zip(COLORS, curves, strict=False):
        points = [(row["step"], row[column]) for row in rows if row.get(column) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), color=color, label=label, linewidth=1.6)
    if axis.lines:
        axis.legend(fontsize=8)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
