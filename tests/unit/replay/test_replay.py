"""A replayed batch gives the figures that a scorer with those settings would have led to."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from scoring_world import World, make_world, sample_group, score_rounding
from tolerances import figures_rounding

from jackpot.bus.kept_trajectories import KeptTrajectories
from jackpot.config import JobSpec
from jackpot.errors import ConfigError
from jackpot.learner.reports.step_metrics import mismatch_figures
from jackpot.replay.replay import LAMBDAS, replay
from jackpot.scorer.target import ActorVersions, HeldPolicy, TargetPolicy
from jackpot.scoring.batch import build_batch
from jackpot.scoring.group_scorer import GroupScorer
from jackpot.scoring.token_weights import token_weights
from jackpot.trajectory import ScoredGroup

TOP_K = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A run directory whose last batch was scored with λ = 1, by trajectories that two actor versions sampled."""
    world = make_world(tmp_path_factory.mktemp("run"), actor_versions=(0, 1))
    job = job_of(world, "tail", 1.0)
    kept = KeptTrajectories(world.run_dir, job.bus.max_payload_bytes)
    kept.write(0, scored(world, job), keep=2)
    (world.run_dir / "job.json").write_text(job.model_dump_json())
    return world


def job_of(world: World, normalizer: str, obrs_lambda: float) -> JobSpec:
    correction = {"name": "jackpot", "normalizer": normalizer, "obrs_lambda": obrs_lambda, "top_k": TOP_K}
    return world.job(correction, rollout={"top_logprobs": TOP_K})


def scored(world: World, job: JobSpec) -> list[ScoredGroup]:
    """What the scorer makes of the same groups under a job's settings."""
    target = TargetPolicy(HeldPolicy(job.policy, "cpu"), world.store, job.algorithm.correction.initial_lambda)
    pending = target.read_newer()
    assert pending is not None
    target.apply(replace(pending, version=0))
    actors = ActorVersions(job.rollout_model, "actor", world.store, "cpu") if job.scorer_runs_actor else None
    groups = [sample_group(world, slot=slot, lengths=(9, 4), versions=(0, 1), top_k=TOP_K) for slot in range(3)]
    return GroupScorer(job, target, actors).score_groups(groups)


@pytest.mark.parametrize("normalizer", ["tail", "union_tail", "union_kappa", "full"])
def test_every_lambda_gives_what_a_scorer_with_it_would_have_led_to(world: World, normalizer: str) -> None:
    result = replay(world.run_dir, job_of(world, normalizer, 1.0))
    assert (result.normalizer, result.batches, result.num_tokens) == (normalizer, [0], 39)
    assert [row["obrs_lambda"] for row in result.rows] == list(LAMBDAS)
    for row in result.rows:
        job = job_of(world, normalizer, row["obrs_lambda"])
        batch = build_batch(scored(world, job), job.algorithm.advantage)
        expected = mismatch_figures(batch, token_weights(batch.tokens, job.algorithm.correction))
        found = {name: row[name] for name in expected}
        error = score_rounding(world, batch.tokens.reference_logprobs.numpy())
        assert found == pytest.approx(expected, **figures_rounding(expected, error))


def test_more_lambda_means_less_acceptance_and_more_alignment(world: World) -> None:
    rows = replay(world.run_dir, job_of(world, "full", 1.0)).rows
    acceptance = [row["rollout_corr/obrs_acceptance_rate"] for row in rows]
    after = [row["rollout_corr/kl_after_exact"] for row in rows]
    assert acceptance == sorted(acceptance, reverse=True)
    assert after == sorted(after, reverse=True)
    assert all(row["rollout_corr/kl_before_exact"] > row["rollout_corr/kl_after_exact"] for row in rows)
    assert all(row["normalizer_error"] == 0 for row in rows)


def test_without_the_weights_z_is_the_mean_acceptance(world: World, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(world.run_dir / "trajectories", run_dir / "trajectories")
    result = replay(run_dir, job_of(world, "tail", 1.0), [1.0, 2.0])
    assert result.normalizer == "batch mean"
    assert "the models cannot be had" in result.notes[0]
    for row in result.rows:
        assert row["rollout_corr/obrs_normalizer"] == pytest.approx(row["rollout_corr/obrs_acceptance_rate"])
        assert "rollout_corr/kl_after_exact" not in row


def test_other_corrections_have_one_row(world: World) -> None:
    job = world.job({"name": "icepop", "low": 0.5, "high": 2.0})
    result = replay(world.run_dir, job)
    (row,) = result.rows
    batch = build_batch(KeptTrajectories(world.run_dir, 1 << 20).read(0), job.algorithm.advantage)
    ratio = (batch.tokens.reference_logprobs - batch.tokens.actor_logprobs).exp()
    masked = (ratio < 0.5) | (ratio > 2.0)
    assert 0 < row["rollout_corr/clipped_fraction_c1"] == pytest.approx(float(masked.float().mean()))
    assert row["rollout_corr/weight_mean"] == pytest.approx(float(ratio.masked_fill(masked, 0).double().mean()))


def test_a_run_without_trajectories_says_what_to_do(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.keep_trajectories"):
        replay(tmp_path, job_of(world, "tail", 1.0))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from jackpot.cli import main; main()", "replay", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110)


def test_the_command_prints_a_table_or_json(world: World) -> None:
    table = run(str(world.run_dir))
    assert table.returncode == 0, table.stderr
    assert all(heading in table.stdout for heading in ("λ", "accept", "KL before", "KL after", "ESS"))
    assert "0.25" in table.stdout
    as_json = run(str(world.run_dir), "algorithm.correction.c1=1.5", "--lambda", "0.5", "--json")
    found = json.loads(as_json.stdout)
    assert [row["obrs_lambda"] for row in found["rows"]] == [0.5]
    assert found["rows"][0]["rollout_corr/clipped_fraction_c1"] > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["algorithm.correction.lambda=1"], "unknown key"),
        (["--correction", "tsi"], "Did you mean 'tis'?"),
    ],
)
def test_slips_are_named(world: World, arguments: Sequence[str], complaint: str) -> None:
    result = run(str(world.run_dir), *arguments)
    assert result.returncode == 2
    assert complaint in result.stderr
