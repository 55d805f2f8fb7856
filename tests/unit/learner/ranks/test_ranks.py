"""Several ranks against one process: the same parameters and figures, and each other's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import TEST_SECONDS
from ranks_world import EPSILON, make_steps_smooth, run_ranks
from safetensors.torch import load_file
from tolerances import model_rounding, unit_roundoff
from torch import Tensor

from jackpot.config import JobSpec, LearnerConfig
from jackpot.learner.checkpoints.checkpoint_store import CheckpointStore, Progress
from jackpot.learner.ranks.batch_broadcast import batch_from_bytes, batch_to_bytes
from jackpot.scoring.batch import Batch, build_batch
from jackpot.trajectory import ScoredGroup

from ..conftest import MOST_TOKENS, MakeGroups, MakeJob, MakeTrainer, same_figures

pytestmark = pytest.mark.timeout(TEST_SECONDS)

STEPS = 3


def make_all(job: JobSpec, make_groups: MakeGroups, **settings: Any) -> list[list[ScoredGroup]]:
    return [make_groups(job, seed=seed, **settings) for seed in range(STEPS)]


def batches_of(job: JobSpec, groups: list[list[ScoredGroup]]) -> list[Batch]:
    return [build_batch(one, job.algorithm.advantage, job.learner.max_sequence_tokens) for one in groups]


def trained_alone(job: JobSpec, make_trainer: MakeTrainer, batches: list[Batch]) -> tuple[Any, list[dict[str, float]]]:
    trainer = make_steps_smooth(make_trainer(job))
    rows: list[dict[str, float]] = []
    for batch in batches:
        rows += trainer.train_batch(batch, len(rows))
    return trainer, rows


def assert_same_weights(directory: Path, trainer: Any, rows: list[dict[str, float]]) -> None:
    """Of the trainer, whose steps ``rows`` shows, and of rank 0."""
    for role in trainer.models:
        expected, got = trainer.weights(role), load_file(directory / f"{role}.safetensors")
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            atol = weights_rounding(trainer, role, rows, tensor)
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def weights_rounding(trainer: Any, role: str, rows: list[dict[str, float]], tensor: Tensor) -> float:
    """How far a tensor of two trainings may lie apart: each step follows its gradient, whose elements are no larger
    than its norm, and rounds the weight twice in both. Weights that differ so add next to nothing to the next
    gradient's rounding."""
    learner, config = trainer.job.learner, trainer.models[role].config
    norms = [min(row[f"{role}/grad_norm"], learner.max_grad_norm) for row in rows]
    gradients = sum(model_rounding(config, MOST_TOKENS, norm, backward=True) for norm in norms)
    rounded = 4 * len(rows) * unit_roundoff() * float(tensor.abs().max())
    return 2 * learner.lr / EPSILON * gradients + rounded


def assert_same_figures(directory: Path, trainer: Any, rows: list[dict[str, float]], batch: Batch) -> None:
    """Of the trainer and of rank 0."""
    found: list[dict[str, float]] = json.loads((directory / "metrics.json").read_text())
    for row, expected in zip(found, rows, strict=True):
        assert row == same_figures(expected, trainer, batch)


def with_processes(job: JobSpec, processes: int) -> JobSpec:
    return job.model_copy(update={"learner": job.learner.model_copy(update={"processes": processes})})


def test_two_ranks_train_as_one_process_does_and_one_process_goes_on_from_their_checkpoint(
    tmp_path: Path, make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    """Several packed passes per step, of different lengths on the two ranks, the clip at work, λ following a rate.
    Each rank reads its own groups; of the third batch one is gone, and rank 0 sends it whole."""
    job = make_job(
        "learner={lr: 0.01, max_grad_norm: 0.5, weight_decay: 0.1, max_batch_tokens: 40, max_sequence_tokens: 12}",
        "learner.packing=always",
        "algorithm.correction={acceptance_rate: 0.9}",
        "algorithm.loss_normalization=sequence",
    )
    groups = make_all(job, make_groups)
    batches = batches_of(job, groups)
    trainer, rows = trained_alone(job, make_trainer, batches)
    forgetful = with_processes(job.model_copy(update={"learner": checkpointed(job)}), 2)
    plan = [["train", 0], ["save"], ["train", 1], ["train", 2]]
    readable = [*groups[0], *groups[1], *groups[2][1:]]
    done = run_ranks(tmp_path / "ranks", forgetful, batches, plan, 2, readable)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "cannot read its groups of step 2" in done.stderr and "step 1" not in done.stderr
    own = json.loads((tmp_path / "ranks" / "own-1.json").read_text())
    assert [len(found) for found in own] == [2, 2, 1], "half of each batch, but for what is gone"
    assert_same_weights(tmp_path / "ranks", trainer, rows)
    assert_same_figures(tmp_path / "ranks", trainer, rows, batches[0])
    # Version 0 sampled all: the second step has it in shards beside those that learn, the third has it no more.
    steps = json.loads((tmp_path / "ranks" / "metrics.json").read_text())
    seen = [row.get("rollout/canary_max_difference") for row in steps]
    assert seen[0] < 1e-4 and seen[1] < 1e-4 and seen[2] is None
    probes = json.loads((tmp_path / "ranks" / "probes.json").read_text())
    for role in trainer.models:
        expected_probe = trainer.probe(role)
        assert probes[role]["token_ids"] == expected_probe.token_ids
        for name in ("logprobs", "initial_logprobs"):
            # The weights differ by as much as assert_same_weights allows.
            assert probes[role][name] == pytest.approx(getattr(expected_probe, name), rel=1e-3, abs=1e-4)

    store = CheckpointStore(tmp_path / "ranks" / "checkpoints", keep=2)
    path = store.latest()
    assert path is not None and len(list(path.glob("*.safetensors"))) == 2  # each rank wrote its own
    resumed = make_steps_smooth(make_trainer(job))
    assert resumed.restore(store, path).step == 1
    for step in (1, 2):
        resumed.train_batch(batches[step], step)
    assert_same_weights(tmp_path / "ranks", resumed, rows)


def test_four_ranks_go_on_from_the_checkpoint_of_one_process(
    tmp_path: Path, make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    """Target = policy, KL to the initial policy, two updates a batch; a step has fewer sequences than ranks."""
    job = make_job(
        "algorithm.correction={target: policy}",
        "algorithm.kl_penalty.weight=0.1",
        "learner={lr: 0.01, groups_per_batch: 2, updates_per_batch: 2, steps: 4}",
    )
    groups = make_all(job, make_groups, with_topk=True, num_groups=2)
    batches = batches_of(job, groups)
    trainer = make_steps_smooth(make_trainer(job))
    before = trainer.train_batch(batches[0], 0)
    store = CheckpointStore(tmp_path / "ranks" / "checkpoints", keep=2)
    trainer.begin_checkpoint(
        store, Progress(2, 1, trainer.lambda_control.obrs_lambda, trainer.lambda_control.state())
    ).finish()
    rows = trainer.train_batch(batches[1], 2)
    done = run_ranks(tmp_path / "ranks", with_processes(job, 4), batches, [["restore"], ["train", 1]], 4, groups[1])
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_weights(tmp_path / "ranks", trainer, before + rows)
    assert_same_figures(tmp_path / "ranks", trainer, rows, batches[1])


def test_kl_in_the_reward_is_the_same_over_two_ranks(
    tmp_path: Path, make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    """Five groups and small passes: one rank repeats a sequence that does not count, and every rank needs the
    divergence of all sequences, since advantages are of the whole batch."""
    job = make_job(
        "algorithm.kl_penalty={weight: 0.5, applied_to: reward}",
        "algorithm.correction=tis",
        "algorithm.advantage=reinforce_plus_plus",
        "learner={lr: 0.01, groups_per_batch: 5, max_batch_tokens: 40}",
    )
    groups = [make_groups(job, seed=seed, num_groups=5) for seed in range(2)]
    batches = batches_of(job, groups)
    trainer, rows = trained_alone(job, make_trainer, batches)
    plan = [["train", 0], ["train", 1]]
    done = run_ranks(tmp_path / "ranks", with_processes(job, 2), batches, plan, 2, [*groups[0], *groups[1]])
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_weights(tmp_path / "ranks", trainer, rows)
    assert_same_figures(tmp_path / "ranks", trainer, rows, batches[0])
    assert rows[1]["policy/kl_initial"] > 0


def checkpointed(job: JobSpec) -> LearnerConfig:
    return job.learner.model_copy(update={"activation_checkpointing": True})


def test_a_batch_is_the_same_after_its_way_to_another_rank(make_job: MakeJob, make_groups: MakeGroups) -> None:
    job = make_job()
    batch = build_batch(make_groups(job, with_topk=True), job.algorithm.advantage)
    got = batch_from_bytes(batch_to_bytes(batch))
    assert batch_to_bytes(got) == batch_to_bytes(batch)
    assert [s.trajectory_id for s in got.sequences] == [s.trajectory_id for s in batch.sequences]
    assert torch.equal(got.tokens.topk_logprobs, batch.tokens.topk_logprobs)
    assert (got.temperature, got.group_starts, got.exact_kl) == (batch.temperature, batch.group_starts, None)
