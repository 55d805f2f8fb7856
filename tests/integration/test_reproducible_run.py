"""A seed decides every sample, mask and step of a job, through all services."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job_world import MAX_GROUP_BYTES, jackpot_run, sampled_tokens, write_job
from patience import TEST_SECONDS

from jackpot.bus.kept_trajectories import KeptTrajectories

MakeModel = Callable[..., Path]
STEPS = 4
TIMES = ("time", "throughput/")

SET_ORDER_TASK = """
from jackpot.demo.task import ComplementTask

class SetOrderTask(ComplementTask):
    # Its prompts come in the order of a set of texts, as those of some generators do.
    def __init__(self, params, seed):
        super().__init__(params, seed)
        by_prompt = {item.prompt: item for item in self._train}
        self._train = [by_prompt[prompt] for prompt in set(by_prompt)]
"""


def rows_but_for_times(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]


def token_figures(directory: Path) -> list[bytes]:
    """Every log-probability, score and mask that was trained on, to the bit."""
    kept = KeptTrajectories(directory, MAX_GROUP_BYTES)
    groups = [scored for batch in range(STEPS) for scored in kept.read(batch)]
    sampled = [trajectory.actor_logprobs for scored in groups for trajectory in scored.group.trajectories]
    scores = [
        array
        for scored in groups
        for score in scored.scores
        for array in (score.target_logprobs, score.acceptance_probs, score.mask, score.normalizer_head)
    ]
    return [array.tobytes() for array in (*sampled, *scores)]


def weights(directory: Path) -> dict[str, str]:
    files = sorted((directory / "export").rglob("*.safetensors"))
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def outcome(directory: Path) -> dict[str, Any]:
    return {
        "rows": rows_but_for_times(directory / "metrics.jsonl"),
        "evaluations": rows_but_for_times(directory / "evaluations.jsonl"),
        "tokens": [sampled_tokens(directory, batch) for batch in range(STEPS)],
        "figures": token_figures(directory),
        "weights": weights(directory),
    }


@pytest.mark.timeout(TEST_SECONDS)
def test_two_synchronous_runs_of_a_seed_are_the_same_to_the_bit(
    tmp_path: Path, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "set_order_task.py").write_text(SET_ORDER_TASK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    job_file = write_job(tmp_path, make_model, groups_per_batch=4)
    found = []
    # Two replicas each of rollout and scorer: which of them does what is a matter of timing.
    settings = [f"learner.steps={STEPS}", "orchestrator.max_staleness=0", "rollout.replicas=2", "scorer.replicas=2"]
    settings += ["evaluation.every=1", f"run.keep_trajectories={STEPS}", "task.name=python:set_order_task:SetOrderTask"]
    for name, seed in (("first", 5), ("second", 5), ("other", 6)):
        directory = tmp_path / name
        arguments = [str(job_file), *settings, "task.params.prompts=50", f"seed={seed}", "--run-dir", str(directory)]
        with jackpot_run(*arguments, directory=directory) as run:
            code, _, stderr = run.finish()
        assert code == 0, stderr
        found.append(outcome(directory))
    first, second, other = found
    assert len(first["rows"]) == STEPS and len(first["weights"]) == 2
    assert [row["step"] for row in first["evaluations"]] == list(range(STEPS + 1))
    assert first == second
    assert all(first[what] != other[what] for what in first)
