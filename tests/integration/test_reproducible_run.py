"""A seed decides every sample, mask and step of a job, through all services."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job_world import jackpot_run, write_job

MakeModel = Callable[..., Path]
TIMES = ("time", "throughput/")


def rows_but_for_times(directory: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


def weights(directory: Path) -> dict[str, str]:
    files = sorted((directory / "export").rglob("*.safetensors"))
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.timeout(400)
def test_two_synchronous_runs_of_a_seed_are_the_same_to_the_bit(tmp_path: Path, make_model: MakeModel) -> None:
    job_file = write_job(tmp_path, make_model, groups_per_batch=4)
    found = []
    # Two replicas each of rollout and scorer: which of them does what is a matter of timing.
    settings = ["learner.steps=4", "orchestrator.max_staleness=0", "rollout.replicas=2", "scorer.replicas=2"]
    for name, seed in (("first", 5), ("second", 5), ("other", 6)):
        directory = tmp_path / name
        arguments = [str(job_file), *settings, f"seed={seed}", "--run-dir", str(directory)]
        with jackpot_run(*arguments, directory=directory) as run:
            code, _, stderr = run.finish()
        assert code == 0, stderr
        found.append((rows_but_for_times(directory), weights(directory)))
    first, second, other = found
    assert len(first[0]) == 4 and len(first[1]) == 2
    assert first == second
    assert first[0] != other[0] and first[1] != other[1]
