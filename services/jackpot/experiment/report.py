"""The report of a study: Markdown with figures, and a CSV of its runs; computed from results alone. No torch."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from jackpot.errors import ConfigError
from jackpot.experiment.figures import draw_bars, draw_curves
from jackpot.experiment.grid import Cell
from jackpot.experiment.measures import Summary, area, dips, final, summarize
from jackpot.experiment.records import Result
from jackpot.experiment.statistics import Estimate
from jackpot.experiment.study import Study

Results = Mapping[Cell, Sequence[Result]]
CSV_FILE = "runs.csv"
FIGURES = {
    "KL(policy‖actor), end": "last kl_policy_actor",
    "KL(p_t‖p_inf)": "mean kl_before",
    "acceptance": "mean acceptance",
    "ESS": "mean ess",
}
"""Columns of the tables: at the end of training, or its mean."""
PURPOSES = {
    "search": "Search. These runs chose what to confirm; their seeds prove nothing.",
    "confirmation": "Confirmation, on seeds that no search has seen; arms and metric were in the study file before.",
    "ablation": "Ablation: one thing varied at a time. Not corrected for how many things there are.",
}


def write_report(study: Study, results: Results, directory: Path) -> Path:
    """Write ``<directory>.md``, and into the directory the figures and a CSV of all runs.

    Args:
        study: the study.
        results: as :func:`jackpot.experiment.runner.run_study` returns them.
        directory: where results are.

    Raises:
        ConfigError: there are no results, or the notes cannot be read.
    """
    if not results:
        raise ConfigError("study", study.name, "has no results", "Run it without --report-only.")
    directory.mkdir(parents=True, exist_ok=True)
    summaries = summarize(study, results)
    _write_csv(directory / CSV_FILE, study, results)
    parts = [f"# {study.config.title}", _notes(study), *_how(study, results, directory)]
    for phase in study.config.phases:
        parts += _phase(study, phase, results, summaries, directory)
    parts += _settings(study)
    report = directory.with_name(directory.name + ".md")
    report.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return report


def _notes(study: Study) -> str:
    if study.config.notes is None:
        return ""
    path = study.path.parent / study.config.notes
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("notes", study.config.notes, f"cannot be read ({error})", "Name a Markdown file.") from None


def _how(study: Study, results: Results, directory: Path) -> list[str]:
    config = study.config
    distinct = {result.key: result for runs in results.values() for result in runs}
    seconds = sum(result.seconds for result in distinct.values())
    kind = "CPU" if config.execution == "inline" else "wall"
    dip, primary = config.metrics.dip, {"area": "area under the curve", "final": "final accuracy"}
    interval = {"t": "Student's t", "bootstrap": "bootstrap"}[config.metrics.interval]
    return [
        "## How it was made",
        "\n".join(
            [
                f"- Study file `{study.path.name}`, base job `{config.job}`, {len(distinct)} runs, "
                f"{seconds / 60:.0f} {kind} minutes in all ({seconds / len(distinct):.1f} s a run), `execution: "
                f"{config.execution}`.",
                f"- Metric, declared in the file: {primary[config.metrics.primary]} of the policy's held-out accuracy "
                f"(its own samples). A *dip* is an accuracy below {dip.below:g} after step {dip.after_step}.",
                f"- Intervals are 95 % ({interval}; shares: Wilson). Differences are taken seed by seed against "
                f"the arm named; p is the two-sided sign-flip test's, not corrected for the number of comparisons.",
                f"- Every run: [`{directory.name}/{CSV_FILE}`]({directory.name}/{CSV_FILE}), curves in "
                f"[`{directory.name}/results.json`]({directory.name}/results.json).",
                f"- This report again, without running anything: `jackpot experiment {study.path.name} --report-only`. "
                f"All runs again: `jackpot experiment {study.path.name} --out NEW_DIRECTORY`.",
            ]
        ),
    ]


def _phase(study: Study, name: str, results: Results, summaries: Mapping[Cell, Summary], directory: Path) -> list[str]:
    phase = study.config.phases[name]
    headline = f"## {name[0].upper()}{name[1:]}"
    variants = dict.fromkeys(cell.variant for cell in summaries if cell.phase == name)
    if not variants:
        return [headline, "Not run."]
    parts = [headline, f"{PURPOSES[phase.purpose]} Seeds {', '.join(map(str, phase.seeds))}."]
    for variant in variants:
        cells = {cell.arm: cell for cell in summaries if cell.phase == name and cell.variant == variant}
        if variant is not None:
            parts += [f"### {variant}", _code(_variant(study, variant)) or "The settings of all runs (below)."]
        if phase.purpose == "search":
            parts.append(_search_table(study, {arm: (summaries[c], results[c]) for arm, c in cells.items()}))
        else:
            parts += _figures(study, cells, results, summaries, directory)
            parts.append(_table(study, {arm: summaries[cell] for arm, cell in cells.items()}, name))
    return parts


def _figures(
    study: Study,
    cells: Mapping[str, Cell],
    results: Results,
    summaries: Mapping[Cell, Summary],
    directory: Path,
) -> list[str]:
    cell = next(iter(cells.values()))
    phase = study.config.phases[cell.phase]
    title = cell.phase if cell.variant is None else f"{cell.phase}, {cell.variant}"
    stem = title.replace(", ", "-").replace(" ", "-").replace("/", "-")
    pictures = []
    if phase.purpose == "confirmation":
        draw_curves({arm: results[c] for arm, c in cells.items()}, directory / f"{stem}-curves.svg", title)
        pictures.append(f"![Curves: {title}]({directory.name}/{stem}-curves.svg)")
    reference = phase.compare_to or study.config.compare_to
    bars = {arm: summaries[c] for arm, c in cells.items()}
    draw_bars(bars, directory / f"{stem}-bars.svg", title, reference)
    return [*pictures, f"![Means: {title}]({directory.name}/{stem}-bars.svg)"]


def _table(study: Study, summaries: Mapping[str, Summary], phase: str) -> str:
    metrics = study.config.metrics
    against = study.config.phases[phase].compare_to or study.config.compare_to
    headings = ["arm", "runs", "area under curve", "final accuracy", f"dips below {metrics.dip.below:g}"]
    headings += [f"{metrics.primary} − {against}", "p", *FIGURES]
    rows = []
    for arm, summary in summaries.items():
        difference = summary.difference
        rows.append(
            [
                arm + (f" ({summary.num_failed} not finite)" if summary.num_failed else ""),
                str(summary.area.count),
                _cell(summary.area),
                _cell(summary.final),
                f"{round(summary.dips.mean * summary.dips.count)}/{summary.dips.count}",
                "" if difference is None else _cell(difference.estimate, sign=True),
                "" if difference is None else f"{difference.p:.2g}",
                *(_mean(summary, name) for name in FIGURES.values()),
            ]
        )
    return _markdown(headings, rows)


def _search_table(study: Study, results_by_arm: Mapping[str, tuple[Summary, Sequence[Result]]]) -> str:
    """Seed by seed: intervals of two or three runs are meaningless."""
    headings = ["arm", "area under curve", "seed: area", "seed: final accuracy"]
    rows = []
    for arm, (summary, results) in results_by_arm.items():
        areas = ", ".join(f"{result.seed}: {area(result):.2f}" for result in results)
        finals = ", ".join(f"{result.seed}: {final(result):.2f}" for result in results)
        rows.append([arm, f"{summary.area.mean:.3f}", areas, finals])
    return _markdown(headings, rows)


def _settings(study: Study) -> list[str]:
    config = study.config
    ages = f"`staleness={config.inline.staleness}` `reference_age={config.inline.reference_age}`"
    all_runs = f"All runs: {_code(config.settings) or 'those of the base job'}"
    models = "Models: those of the job file."
    if config.models is not None:
        changed = _code(_models(config.models.policy, config.models.actor))
        models = f"Models: recipe `{config.models.recipe}`, warmed up separately for each seed. {changed}".strip()
    return [
        "## Settings",
        f"{all_runs}{' ' + ages if config.execution == 'inline' else ''}",
        models,
        _markdown(["arm", "settings"], [[arm, _code(_arm(study, arm)) or "–"] for arm in config.arms]),
    ]


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, columns that are empty in every row are left out."""
    kept = [place for place in range(len(headings)) if any(row[place] not in ("", "–") for row in rows)]
    rule = ["---" if place == 0 else "--:" for place in range(len(headings))]
    lines = [headings, rule, *rows]
    return "\n".join(f"| {' | '.join(line[place] for place in kept)} |" for line in lines)


def _arm(study: Study, arm: str) -> Sequence[str]:
    config = study.config.arms[arm]
    models = () if config.models is None else _models(config.models.policy, config.models.actor)
    ages = () if config.inline is None else (f"staleness={config.inline.staleness}",)
    return [*config.settings, *models, *ages]


def _variant(study: Study, variant: str) -> Sequence[str]:
    config = study.config.variants[variant]
    models = () if config.models is None else _models(config.models.policy, config.models.actor)
    ages = config.inline
    inline = () if ages is None else (f"staleness={ages.staleness}", f"reference_age={ages.reference_age}")
    return [*config.settings, *models, *inline]


def _models(policy: Mapping[str, int | float], actor: Mapping[str, int | float]) -> list[str]:
    return [f"policy.{k}={v:g}" for k, v in policy.items()] + [f"actor.{k}={v:g}" for k, v in actor.items()]


def _code(settings: Sequence[str]) -> str:
    return " ".join(f"`{setting}`" for setting in settings)


def _cell(estimate: Estimate, *, sign: bool = False) -> str:
    mean = f"{estimate.mean:+.3f}" if sign else f"{estimate.mean:.3f}"
    if estimate.low is None or estimate.high is None:
        return mean
    low, high = (f"{end:+.3f}" if sign else f"{end:.3f}" for end in (estimate.low, estimate.high))
    return f"{mean} [{low}, {high}]"


def _mean(summary: Summary, name: str) -> str:
    when, _, series = name.partition(" ")
    estimate = (summary.last if when == "last" else summary.series).get(series)
    # Arms without rejection accept everything by definition.
    if estimate is None or (series == "acceptance" and estimate.mean == 1):
        return "–"
    return f"{estimate.mean:.3f}"


def _write_csv(path: Path, study: Study, results: Results) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["phase", "variant", "arm", "seed", "area", "final", "dip", "kl_policy_actor", "acceptance"])
        for cell, runs in results.items():
            for run in runs:
                last = [f"{v:.4f}" for v in run.series.get("kl_policy_actor", ()) if v is not None][-1:]
                accepted = [v for v in run.series.get("acceptance", ()) if v is not None]
                acceptance = [f"{sum(accepted) / len(accepted):.4f}"] if accepted else [""]
                figures = [f"{area(run):.4f}", f"{final(run):.4f}", int(dips(run, study.config.metrics.dip))]
                place = [cell.phase, cell.variant or "", cell.arm, run.seed]
                writer.writerow([*place, *figures, *(last or [""]), *acceptance])
