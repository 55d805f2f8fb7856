"""What runs leave, how it is kept, and what is said of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jackpot.config import parse_job
from jackpot.errors import ConfigError
from jackpot.experiment.grid import Cell, Run
from jackpot.experiment.measures import area, dips, final, summarize
from jackpot.experiment.records import (
    Result,
    find,
    make_result,
    read_collection,
    read_results,
    write_collection,
    write_result,
)
from jackpot.experiment.study import DipConfig, Study, StudyConfig

JOB: dict[str, Any] = {
    "policy": {"model": "builtin:complement/policy"},
    "actor": {"model": "builtin:complement/actor"},
    "task": {"name": "complement"},
}


def run_of(*overrides: str) -> Run:
    return Run(parse_job(JOB, overrides), None, "inline", 1, 0)


def result_of(run: Run, *accuracies: float) -> Result:
    points = [(10 * place, accuracy) for place, accuracy in enumerate(accuracies)]
    steps = [{"step": step, "reward/mean": step / 100, "kl/policy_actor": 0.5} for step in range(1, points[-1][0] + 1)]
    return make_result(run, points, steps, 1.25, None)


def test_series_are_means_between_evaluations() -> None:
    steps = [{"step": 1.0, "reward/mean": 0.2}, {"step": 2.0, "reward/mean": 0.4}, {"step": 3.0, "reward/mean": 0.7}]
    result = make_result(run_of(), [(0, 0.1), (2, 0.3), (3, 0.123456789), (4, 1.0)], steps, 2.0, None)
    assert result.series == {"reward": [0.3, 0.7, None]}
    assert result.evaluations == ((0, 0.1), (2, 0.3), (3, 0.12346), (4, 1.0))


def test_measures_of_a_run() -> None:
    result = replace(result_of(run_of(), 0.0), evaluations=((0, 0.0), (10, 0.5), (20, 0.5), (40, 0.1)))
    assert area(result) == pytest.approx((2.5 + 5.0 + 6.0) / 40)
    assert final(result) == 0.1
    assert dips(result, DipConfig(below=0.3, after_step=20))
    assert not dips(result, DipConfig(below=0.1, after_step=20))
    assert not dips(result, DipConfig(below=0.6, after_step=40))


def test_a_result_is_written_and_read_back(tmp_path: Path) -> None:
    result = result_of(run_of("seed=3"), 0.1, 0.9)
    write_result(tmp_path / "runs", result)
    (tmp_path / "runs" / ".half-written.part").write_text("{")
    assert read_results(tmp_path / "runs") == {result.key: result}
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [".half-written.part", f"{result.key}.json"]


def test_a_collection_keeps_each_set_of_settings_once(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    tis = run_of("seed=1", "algorithm.correction=tis", "learner.lr=1e-3", "actor=policy")
    runs = [run_of("seed=1"), run_of("seed=2"), tis, run_of("seed=1", "learner.lr=1e-3")]
    results = [result_of(run, 0.1, 0.2) for run in runs]
    write_collection(path, results)
    assert read_collection(path) == {result.key: result for result in results}
    assert len(json.loads(path.read_text())["settings"]) == 3
    first = path.read_bytes()
    write_collection(path, reversed(results))
    assert path.read_bytes() == first


def test_a_collection_holds_settings_of_other_versions(tmp_path: Path) -> None:
    path, result = tmp_path / "results.json", result_of(run_of("seed=1"), 0.1, 0.2)
    later = json.loads(json.dumps(result.settings))
    later["job"]["learner"]["packing"] = True
    results = [result, replace(result, key="b", settings=later), replace(result, key="c", settings={**later, "new": 1})]
    write_collection(path, results)
    assert read_collection(path) == {each.key: each for each in results}


def test_a_damaged_collection_is_refused(tmp_path: Path) -> None:
    assert read_collection(tmp_path / "results.json") == {}
    (tmp_path / "results.json").write_text('{"settings": [], "runs": [{"settings": 4}]}')
    with pytest.raises(ConfigError, match=r"results\.json.*is damaged"):
        read_collection(tmp_path / "results.json")


def test_a_result_made_under_another_default_is_not_taken() -> None:
    run = run_of()
    result = result_of(run, 0.1, 0.2)
    assert find({result.key: result}, run) is result
    before = json.loads(json.dumps(result.settings))
    before["job"]["learner"]["max_grad_norm"] = 0.5
    assert find({result.key: replace(result, settings=before)}, run) is None
    before["job"]["learner"]["max_grad_norm"] = result.settings["job"]["learner"]["max_grad_norm"]
    before["job"]["algorithm"]["distillation"]["weight_min"] = 0.4  # nothing follows a KL: it has no effect
    before["job"]["algorithm"]["correction"]["lambda_max"] = 4.0
    before["job"]["rollout"]["replicas"] = 3
    assert find({result.key: replace(result, settings=before)}, run) is not None
    before["job"]["algorithm"]["distillation"]["kl_target"] = 0.1
    assert find({result.key: replace(result, settings=before)}, run) is None
    before["job"]["algorithm"]["distillation"]["kl_target"] = None
    del before["job"]["learner"]["max_grad_norm"]  # a setting that did not exist then
    assert find({result.key: replace(result, settings=before)}, run) is not None
    assert find({}, run) is None


def test_summaries_pair_seeds() -> None:
    config = StudyConfig.model_validate(
        {
            "title": "t",
            "job": "job.yaml",
            "arms": {"tis": {}, "jackpot": {}},
            "phases": {"main": {"purpose": "confirmation", "seeds": [1, 2, 3]}},
            "compare_to": "tis",
            "metrics": {"dip": {"below": 0.3, "after_step": 10}},
        }
    )
    tis, jackpot = Cell("main", None, "tis"), Cell("main", None, "jackpot")
    results = {
        tis: [result_of(run_of(f"seed={seed}"), 0.0, 0.4, last) for seed, last in ((1, 0.6), (2, 0.2), (3, 0.4))],
        jackpot: [result_of(run_of(f"seed={seed}"), 0.0, 0.4, last) for seed, last in ((2, 0.4), (1, 0.7))],
    }
    found = summarize(Study(Path("study.yaml"), config, JOB), results)
    assert found[tis].difference is None
    assert found[tis].final.mean == pytest.approx(0.4)
    assert (found[tis].dips.mean, found[tis].dips.count) == (pytest.approx(1 / 3), 3)
    assert found[tis].last["kl_policy_actor"].mean == 0.5
    difference = found[jackpot].difference
    assert difference is not None
    # By hand: areas differ by a quarter of the last accuracy's difference; seed 3 has no partner.
    assert difference.estimate.count == 2
    assert difference.estimate.mean == pytest.approx((0.2 + 0.1) / 2 / 4)
    assert difference.p == 0.5
