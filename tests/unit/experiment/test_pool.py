"""Which run a worker takes next."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from jackpot.config import parse_job
from jackpot.demo.recipe import COMPLEMENT, models_directory
from jackpot.experiment.grid import Run
from jackpot.experiment.pool import Waiting

JOB = {"policy": {"model": "p"}, "actor": {"model": "a"}, "task": {"name": "complement"}}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Two settings on two seeds, seed by seed, as a study makes them."""
    monkeypatch.setenv("JACKPOT_CACHE", str(tmp_path / "cache"))
    jobs = [parse_job(JOB, [f"algorithm.correction={name}"]) for name in ("tis", "jackpot")]
    return [Run(job, replace(COMPLEMENT, seed=seed), "inline", 1, 0) for seed in (11, 12) for job in jobs]


def test_nobody_waits_for_models_that_another_makes(runs: list[Run]) -> None:
    waiting = Waiting(runs)
    assert waiting.take() is runs[0]
    assert waiting.take() is runs[2]  # not runs[1], whose models are being made
    waiting.ended(runs[2])
    assert waiting.take() is runs[3]  # whose models are there, and still not runs[1]
    assert [waiting.take() for _ in range(2)] == [runs[1], None]


def test_models_that_are_there_hold_nobody_up(runs: list[Run]) -> None:
    for run in runs:
        assert run.recipe is not None
        models_directory(run.recipe).mkdir(parents=True, exist_ok=True)
    waiting = Waiting(runs)
    assert [waiting.take() for _ in range(5)] == [*runs, None]
