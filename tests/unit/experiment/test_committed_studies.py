"""The studies in docs/experiments: their files are valid, and the results beside them are still theirs."""

from __future__ import annotations

from pathlib import Path

import pytest

from jackpot.experiment.grid import runs_of
from jackpot.experiment.records import find, read_collection
from jackpot.experiment.runner import RESULTS_FILE
from jackpot.experiment.study import load_study

STUDIES = sorted((Path(__file__).parents[3] / "docs" / "experiments").glob("*.yaml"))


def test_they_are_found() -> None:
    assert [path.stem for path in STUDIES] == ["shallow_actor", "stale_data", "weaker_actor"]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_no_setting_or_default_has_changed_since_they_were_run(path: Path) -> None:
    """Where a default must change, write the old value into the study file, or run the study again."""
    collected = read_collection(path.with_suffix("") / RESULTS_FILE)
    cells = runs_of(load_study(path))
    found = {cell: [run.key for run in runs if find(collected, run) is not None] for cell, runs in cells.items()}
    assert {key for keys in found.values() for key in keys} == set(collected)
    assert sum(cell.phase == "confirmation" and len(keys) == 16 for cell, keys in found.items()) >= 4
