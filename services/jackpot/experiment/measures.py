"""Measures of a run and of an arm's runs: the metrics that the study file declares. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jackpot.experiment.grid import Cell
from jackpot.experiment.records import Result
from jackpot.experiment.statistics import Estimate, mean_estimate, share_estimate, sign_flip_p
from jackpot.experiment.study import DipConfig, MetricsConfig, Study


@dataclass(frozen=True, slots=True)
class Difference:
    """Differences of two arms, seed by seed."""

    estimate: Estimate
    p: float  # of the two-sided sign-flip test


@dataclass(frozen=True, slots=True)
class Summary:
    """Summary of a cell's runs."""

    area: Estimate
    final: Estimate
    dips: Estimate
    difference: Difference | None  # of the primary metric; None for the arm itself and without common seeds
    series: Mapping[str, Estimate]  # each run's mean over training
    last: Mapping[str, Estimate]  # at the end of training
    seconds: float  # of all runs
    num_failed: int


def area(result: Result) -> float:
    """The policy's accuracy averaged over training: the trapezoidal rule between evaluations, over the last step."""
    points = result.evaluations
    total = sum((b - a) * (x + y) / 2 for (a, x), (b, y) in itertools.pairwise(points))
    return total / (points[-1][0] - points[0][0])


def final(result: Result) -> float:
    """The policy's accuracy at the last step."""
    return result.evaluations[-1][1]


def dips(result: Result, dip: DipConfig) -> bool:
    """Whether the accuracy falls below the threshold after ``after_step``."""
    return any(accuracy < dip.below for step, accuracy in result.evaluations if step > dip.after_step)


def primary(result: Result, metrics: MetricsConfig) -> float:
    """The metric whose differences are reported."""
    return area(result) if metrics.primary == "area" else final(result)


def summarize(study: Study, results: Mapping[Cell, Sequence[Result]]) -> dict[Cell, Summary]:
    """Every cell's summary; cells without results are left out."""
    return {cell: _summary(study, cell, results) for cell in results if results[cell]}


def _summary(study: Study, cell: Cell, results: Mapping[Cell, Sequence[Result]]) -> Summary:
    metrics, of_cell = study.config.metrics, results[cell]
    against = study.config.phases[cell.phase].compare_to or study.config.compare_to
    other = results.get(Cell(cell.phase, cell.variant, against), ()) if cell.arm != against else ()
    return Summary(
        area=mean_estimate([area(result) for result in of_cell], metrics.interval),
        final=mean_estimate([final(result) for result in of_cell], metrics.interval),
        dips=share_estimate(sum(dips(result, metrics.dip) for result in of_cell), len(of_cell)),
        difference=_difference(of_cell, other, metrics),
        series=_figures(of_cell, metrics, lambda values: float(np.mean(values))),
        last=_figures(of_cell, metrics, lambda values: values[-1]),
        seconds=sum(result.seconds for result in of_cell),
        num_failed=sum(result.failure is not None for result in of_cell),
    )


def _difference(results: Sequence[Result], other: Sequence[Result], metrics: MetricsConfig) -> Difference | None:
    theirs = {result.seed: primary(result, metrics) for result in other}
    pairs = [primary(result, metrics) - theirs[result.seed] for result in results if result.seed in theirs]
    if not pairs:
        return None
    return Difference(mean_estimate(pairs, metrics.interval), sign_flip_p(pairs))


def _figures(results: Sequence[Result], metrics: MetricsConfig, of_run: object) -> dict[str, Estimate]:
    assert callable(of_run)
    figures: dict[str, Estimate] = {}
    for name in {name: None for result in results for name in result.series}:
        runs = [[v for v in result.series.get(name, ()) if v is not None] for result in results]
        values = [of_run(run) for run in runs if run]
        if values:
            figures[name] = mean_estimate(values, metrics.interval)
    return figures
