"""The same job under several corrections."""

from __future__ import annotations

import io
from importlib.resources import as_file, files
from typing import Any

from rich.console import Console

from jackpot.config import JobSpec, load_job
from jackpot.control_plane.sessions.comparison import comparison_table, methods


def demo(*overrides: str) -> JobSpec:
    with as_file(files("jackpot.demo") / "demo.yaml") as path:
        return load_job(path, overrides)


def test_the_runs_differ_in_the_correction_and_the_actor_alone() -> None:
    jobs = {method: demo(*changes) for method, changes in methods("jackpot").items()}
    assert list(jobs) == ["on-policy", "none", "tis", "jackpot"]
    assert [job.actor == "policy" for job in jobs.values()] == [True, False, False, False]
    assert [job.algorithm.correction.name for job in jobs.values()] == ["none", "none", "tis", "jackpot"]
    assert jobs["jackpot"] == demo()  # with the file's own settings of the correction
    rest: list[dict[str, Any]] = []
    for job in jobs.values():
        described = job.model_dump()
        del described["actor"], described["algorithm"]["correction"]
        rest.append(described)
    assert rest.count(rest[0]) == 4


def test_each_run_is_what_it_is_called_whatever_the_file_says() -> None:
    settings = "algorithm.correction={name: mis, cap: 3}"
    jobs = {method: demo(settings, *changes) for method, changes in methods("mis").items()}
    assert {method: job.algorithm.correction.name for method, job in jobs.items()} == {
        "on-policy": "none", "jackpot": "jackpot", "none": "none", "tis": "tis", "mis": "mis"
    }  # fmt: skip
    assert jobs["mis"] == demo(settings)


def test_the_table_has_a_line_for_each_run_and_dashes_for_what_it_lacks() -> None:
    whole = {
        "policy_accuracy": {"initial": 0.2, "final": 0.98, "best": 0.99}, "acceptance_rate": 0.8,
        "kl_policy_actor": {"initial": 0.9, "final": 0.1}, "wall_seconds": 61.4,
    }  # fmt: skip
    empty = {
        "policy_accuracy": dict.fromkeys(("initial", "final", "best")), "acceptance_rate": None,
        "kl_policy_actor": dict.fromkeys(("initial", "final")), "wall_seconds": 3.0,
    }  # fmt: skip
    text = io.StringIO()
    Console(file=text, width=120).print(comparison_table({"jackpot": whole, "tis": empty}))
    cells = [line.replace("│", " ").split() for line in text.getvalue().splitlines() if line.startswith("│")]
    assert cells == [
        ["jackpot", "0.200", "0.980", "0.990", "0.800", "0.100", "61"],
        ["tis", "–", "–", "–", "–", "–", "3"],
    ]
