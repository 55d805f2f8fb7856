"""Executes a study's missing runs, and keeps their results. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jackpot.errors import ConfigError, JackpotError
from jackpot.experiment.grid import Cell, Run, runs_of
from jackpot.experiment.pool import make_runs
from jackpot.experiment.records import Result, find, read_collection, read_results, write_collection
from jackpot.experiment.study import Study

RESULTS_FILE = "results.json"
RUNS_DIRECTORY = "runs"


def results_at(directory: Path) -> dict[str, Result]:
    """All results of earlier sessions in a study's directory: the collection, and single runs since."""
    return read_collection(directory / RESULTS_FILE) | read_results(directory / RUNS_DIRECTORY)


def stored_study(study: Study, directory: Path) -> dict[Cell, list[Result]]:
    """A study's existing results, cell by cell, in the order of the file; single runs are collected into one file.

    Args:
        study: the study.
        directory: where its results are.

    Raises:
        ConfigError: a setting of an arm cannot work, or stored results are damaged.
    """
    cells, known = runs_of(study), results_at(directory)
    if (directory / RUNS_DIRECTORY).is_dir():  # of an interrupted study
        write_collection(directory / RESULTS_FILE, _used(cells, known))
    return _by_cell(cells, known)


def run_study(
    study: Study, directory: Path, workers: int, console: Console, phases: Sequence[str] = ()
) -> dict[Cell, list[Result]]:
    """Execute a study's missing runs; all results, cell by cell, in the order of the file.

    Finished runs are never repeated: neither after a crash, nor when arms or seeds are added.

    Args:
        study: the study.
        directory: where results are and go.
        workers: processes at a time.
        console: where progress is shown.
        phases: only these are run; none given is all.

    Raises:
        ConfigError: a phase does not exist, a setting of an arm cannot work, or stored results are damaged.
        JackpotError: runs failed; the others are kept.
    """
    for phase in phases:
        if phase not in study.config.phases:
            names = ", ".join(study.config.phases)
            raise ConfigError("--phase", phase, "is no phase of this study", f"It has {names}.")
    cells = runs_of(study)
    known = results_at(directory)
    wanted = _missing(cells, known, phases)
    if wanted:
        errors = _make(
            study, len({run.key for runs in cells.values() for run in runs}), wanted, directory, workers, console
        )
        known = results_at(directory)
        write_collection(directory / RESULTS_FILE, _used(cells, known))
        if errors:
            raise JackpotError(f"{len(errors)} runs failed; run it again to try them again. {errors[0]}")
    return _by_cell(cells, known)


def _missing(
    cells: Mapping[Cell, Sequence[Run]], known: Mapping[str, Result], phases: Sequence[str]
) -> list[tuple[Cell, Run]]:
    """The missing runs, each key once: phase by phase, and within a phase seed by seed, so that an interrupted study
    has some runs of every arm."""
    missing_runs: dict[str, tuple[tuple[int, int], Cell, Run]] = {}
    order = list(dict.fromkeys(cell.phase for cell in cells))
    for cell, runs in cells.items():
        for turn, run in enumerate(runs):
            if (not phases or cell.phase in phases) and run.key not in missing_runs and find(known, run) is None:
                missing_runs[run.key] = ((order.index(cell.phase), turn), cell, run)
    return [(cell, run) for _, cell, run in sorted(missing_runs.values(), key=lambda entry: entry[0])]


def _make(
    study: Study, total: int, wanted: Sequence[tuple[Cell, Run]], directory: Path, workers: int, console: Console
) -> list[str]:
    """Execute runs and show how they end; returns the errors."""
    console.print(f"{study.name}: {len(wanted)} of {total} runs are to be made", highlight=False)
    places = {run.key: cell for cell, run in wanted}
    done = 0

    def report(run: Run, answer: Mapping[str, Any]) -> None:
        nonlocal done
        done += 1
        cell = places[run.key]
        where = " / ".join(part for part in (cell.phase, cell.variant, cell.arm) if part)
        outcome = answer["error"] or f"accuracy {answer['accuracy']:.3f}, {answer['seconds']:.0f} s"
        line = f"[{done}/{len(wanted)}] {where}, seed {run.job.seed}: {outcome}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    return make_runs([run for _, run in wanted], directory / RUNS_DIRECTORY, workers, report)


def _by_cell(cells: Mapping[Cell, Sequence[Run]], known: Mapping[str, Result]) -> dict[Cell, list[Result]]:
    known_results = {cell: [result for run in runs if (result := find(known, run))] for cell, runs in cells.items()}
    return {cell: results for cell, results in known_results.items() if results}


def _used(cells: Mapping[Cell, Sequence[Run]], known: Mapping[str, Result]) -> list[Result]:
    known_results = (find(known, run) for runs in cells.values() for run in runs)
    return list({result.key: result for result in known_results if result is not None}.values())
