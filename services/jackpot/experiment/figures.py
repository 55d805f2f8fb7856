"""Figures of a study. matplotlib is imported only when one is drawn; the same results give the same files."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jackpot.experiment.measures import Summary
from jackpot.experiment.records import Result
from jackpot.experiment.statistics import mean_estimate

# Distinguishable with colour blindness, too (Okabe and Ito), then greys.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8c8c8c", "#b8a800", "#7a4fbf")
PANELS: Mapping[str, str] = {
    "kl_policy_actor": "KL(policy ‖ actor), nats per token",
    "kl_before": "KL(p_t ‖ p_inf) as sampled, nats per token",
    "acceptance": "acceptance rate",
}
"""Per-step figures that are drawn beside the accuracy."""
BAND_RUNS = 5  # with fewer runs the interval is wider than the plot
DASHES = ("-", "--", "-.", ":")


def draw_curves(results: Mapping[str, Sequence[Result]], path: Path, title: str) -> None:
    """Accuracy of the policy over training, mean and 95 % band, and those of :data:`PANELS` that have values.

    Args:
        results: the runs of each arm.
        path: where the SVG goes.
        title: above it.
    """
    pyplot = _pyplot()
    panels = {name: text for name, text in PANELS.items() if any(_has(name, runs) for runs in results.values())}
    widths = (1.5, *(1 for _ in panels))
    figure, axes = pyplot.subplots(
        1, len(widths), figsize=(3.7 * sum(widths), 4.2), constrained_layout=True, width_ratios=widths, squeeze=False
    )
    figure.suptitle(title, fontsize=11)
    for place, (arm, runs) in enumerate(results.items()):
        style = {"color": COLORS[place % len(COLORS)], "linestyle": DASHES[place // len(COLORS)], "linewidth": 1.6}
        _accuracy(axes[0][0], arm, runs, style)
        for axis, name in zip(axes[0][1:], panels, strict=True):
            if _has(name, runs):
                _series(axis, name, runs, style)
    titles = ("accuracy of the policy's own samples, held out", *panels.values())
    for axis, text in zip(axes[0], titles, strict=True):
        axis.set_title(text, fontsize=10)
        axis.set_xlabel("optimizer step", fontsize=9)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylim(-0.02, 1.02)
    axes[0][0].legend(fontsize=8, loc="upper left", framealpha=0.7)
    _save(figure, path)


def draw_bars(summaries: Mapping[str, Summary], path: Path, title: str, reference: str | None = None) -> None:
    """Area under the curve and final accuracy of each arm, with 95 % intervals.

    Args:
        summaries: of each arm.
        path: where the SVG goes.
        title: above it.
        reference: the arm whose mean is marked by a line.
    """
    pyplot = _pyplot()
    height = 0.9 + 0.3 * len(summaries)
    figure, axes = pyplot.subplots(1, 2, figsize=(11, height), constrained_layout=True, sharey=True)
    figure.suptitle(title, fontsize=11)
    for axis, name, text in ((axes[0], "area", "area under the accuracy curve"), (axes[1], "final", "final accuracy")):
        for place, summary in enumerate(summaries.values()):
            estimate = getattr(summary, name)
            axis.barh(place, estimate.mean, color=COLORS[place % len(COLORS)], alpha=0.85, height=0.7)
            if estimate.low is not None:
                ends = [[estimate.mean - estimate.low], [estimate.high - estimate.mean]]
                axis.errorbar(estimate.mean, place, xerr=ends, color="black", capsize=2.5, linewidth=1.1)
        if reference is not None and reference in summaries:
            axis.axvline(getattr(summaries[reference], name).mean, color="black", linestyle=":", linewidth=1)
        axis.set_title(text, fontsize=10)
        axis.set_xlim(0, 1.02)
        axis.grid(alpha=0.3, axis="x")
    axes[0].set_yticks(range(len(summaries)), list(summaries), fontsize=9)
    axes[0].invert_yaxis()
    _save(figure, path)


def _accuracy(axis: Any, arm: str, runs: Sequence[Result], style: Mapping[str, Any]) -> None:
    # Steps common to all runs: a pipeline may skip one.
    steps = sorted(set.intersection(*({step for step, _ in run.evaluations} for run in runs)))
    table = [[dict(run.evaluations)[step] for run in runs] for step in steps]
    estimates = [mean_estimate(values) for values in table]
    axis.plot(steps, [estimate.mean for estimate in estimates], label=f"{arm} ({len(runs)})", **style)
    if len(runs) >= BAND_RUNS:
        low = [max(0.0, estimate.low or 0.0) for estimate in estimates]
        high = [min(1.0, estimate.high or 0.0) for estimate in estimates]
        axis.fill_between(steps, low, high, color=style["color"], alpha=0.1, linewidth=0)


def _has(name: str, runs: Sequence[Result]) -> bool:
    """Whether an arm's figure is worth plotting: every run has it, and it is not constant by definition."""
    series = [run.series.get(name, (None,)) for run in runs]
    trivial = {"acceptance": 1.0, "kl_before": 0.0}.get(name)
    return (
        len({len(values) for values in series}) == 1
        and all(value is not None for values in series for value in values)
        and any(value != trivial for values in series for value in values)
    )


def _series(axis: Any, name: str, runs: Sequence[Result], style: Mapping[str, Any]) -> None:
    table = [[value for value in run.series[name] if value is not None] for run in runs]
    ends = [step for step, _ in runs[0].evaluations]
    middles = [(low + high) / 2 for low, high in itertools.pairwise(ends)]
    axis.plot(middles[: len(table[0])], np.mean(table, axis=0), **style)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    _pyplot().close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    # No date and fixed ids, so that the same results give the same bytes; text stays text, which keeps files small.
    matplotlib.rcParams.update({"svg.hashsalt": "jackpot", "svg.fonttype": "none", "font.family": "sans-serif"})
    from matplotlib import pyplot

    return pyplot
