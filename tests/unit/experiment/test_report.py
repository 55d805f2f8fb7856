"""The report: figures that add up, columns that say something, files that come out the same twice."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from jackpot.config import parse_job
from jackpot.errors import ConfigError
from jackpot.experiment.grid import Cell, Run
from jackpot.experiment.records import Result, make_result
from jackpot.experiment.report import write_report
from jackpot.experiment.study import Study, StudyConfig

JOB: dict[str, Any] = {
    "policy": {"model": "builtin:complement/policy"},
    "actor": {"model": "builtin:complement/actor"},
    "task": {"name": "complement"},
}
CONFIG: dict[str, Any] = {
    "title": "Two arms",
    "job": "job.yaml",
    "settings": ["learner.steps=20"],
    "arms": {"TIS": {"settings": ["algorithm.correction=tis"]}, "Jackpot": {}},
    "variants": {"fast": {"settings": ["learner.lr=1e-3"]}},
    "phases": {
        "confirmation": {"purpose": "confirmation", "seeds": [11, 12]},
        "search": {"purpose": "search", "seeds": [1, 2], "variants": ["fast"]},
        "later": {"purpose": "ablation", "seeds": [11]},
    },
    "compare_to": "TIS",
    "metrics": {"dip": {"below": 0.3, "after_step": 10}},
}


def result_of(seed: int, correction: str, *accuracies: float) -> Result:
    run = Run(parse_job(JOB, [f"seed={seed}", f"algorithm.correction={correction}"]), None, "inline", 0, 0)
    acceptance = 1.0 if correction == "tis" else 0.75
    steps = [{"step": 10.0 * n, "rollout_corr/obrs_acceptance_rate": acceptance} for n in (1, 2)]
    return make_result(run, [(10 * n, accuracy) for n, accuracy in enumerate(accuracies)], steps, 60.0, None)


def made(tmp_path: Path, **changes: Any) -> tuple[Study, dict[Cell, list[Result]]]:
    study = Study(tmp_path / "study.yaml", StudyConfig.model_validate(CONFIG | changes), JOB)
    results = {
        Cell("confirmation", None, "TIS"): [result_of(11, "tis", 0.0, 0.4, 0.2), result_of(12, "tis", 0.0, 0.4, 0.6)],
        Cell("confirmation", None, "Jackpot"): [
            result_of(11, "jackpot", 0.0, 0.6, 0.8),
            result_of(12, "jackpot", 0.0, 0.6, 0.8),
        ],
        Cell("search", "fast", "TIS"): [result_of(1, "tis", 0.0, 0.5, 1.0)],
    }
    return study, results


def test_tables(tmp_path: Path) -> None:
    study, results = made(tmp_path)
    report = write_report(study, results, tmp_path / "study").read_text()
    rows = {line.split(" | ")[0].strip("| "): line for line in report.splitlines() if line.startswith("| ")}
    # Areas: 0.25 and 0.35 against twice 0.5; the interval of two runs is 12.7062 · s/√2 = 0.635.
    assert "| TIS | 2 | 0.300 [-0.335, 0.935] | 0.400 [" in report
    assert "| 1/2 |" in report
    assert (
        "| Jackpot | 2 | 0.500 [0.500, 0.500] | 0.800 [0.800, 0.800] | 0/2 | +0.200 [-0.435, +0.835] | 0.5 | 0.750 |"
        in report
    )
    assert rows["arm"].count("|") == 3  # the last table's: arm and settings
    assert "KL(policy‖actor)" not in report  # nobody has it
    assert "| TIS | 0.500 | 1: 0.50 | 1: 1.00 |" in report  # the search's, seed by seed
    assert "`learner.lr=1e-3`" in report and "## Later\n\nNot run." in report
    assert "5 runs, 5 CPU minutes in all (60.0 s a run)" in report


def test_the_csv_has_every_run(tmp_path: Path) -> None:
    study, results = made(tmp_path)
    write_report(study, results, tmp_path / "study")
    with (tmp_path / "study" / "runs.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["phase"], row["arm"], row["seed"], row["area"], row["final"], row["dip"]) for row in rows] == [
        ("confirmation", "TIS", "11", "0.2500", "0.2000", "1"),
        ("confirmation", "TIS", "12", "0.3500", "0.6000", "0"),
        ("confirmation", "Jackpot", "11", "0.5000", "0.8000", "0"),
        ("confirmation", "Jackpot", "12", "0.5000", "0.8000", "0"),
        ("search", "TIS", "1", "0.5000", "1.0000", "0"),
    ]
    assert rows[2]["acceptance"] == "0.7500"


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    study, results = made(tmp_path)
    directory = tmp_path / "study"
    write_report(study, results, directory)
    first = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert set(first) == {"runs.csv", "confirmation-curves.svg", "confirmation-bars.svg"}
    write_report(study, results, directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == first
    assert all(len(data) < 100_000 for data in first.values())


def test_notes_come_first_and_must_be_there(tmp_path: Path) -> None:
    study, results = made(tmp_path, notes="notes.md")
    with pytest.raises(ConfigError, match=r"notes = 'notes\.md': cannot be read"):
        write_report(study, results, tmp_path / "study")
    (tmp_path / "notes.md").write_text("What was found.\n")
    report = write_report(study, results, tmp_path / "study").read_text()
    assert report.startswith("# Two arms\n\nWhat was found.\n\n## How it was made")
