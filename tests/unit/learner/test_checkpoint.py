from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jackpot.errors import JackpotError
from jackpot.learner.batch import build_batch
from jackpot.learner.checkpoint import CheckpointStore, Progress

from .conftest import MakeGroups, MakeJob, MakeTrainer


def test_two_steps_and_a_resume_and_two_steps_equal_four_steps_bit_for_bit(
    tmp_path: Path, make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    steered = ("algorithm.distillation.kl_target=0.1", "algorithm.correction={acceptance_rate: 0.8, target: policy}")
    job = make_job("learner.weight_decay=0.1", *steered)
    batches = [build_batch(make_groups(job, seed=seed, with_topk=True), job.algorithm.advantage) for seed in range(4)]
    straight = make_trainer(job)
    for step, batch in enumerate(batches):
        straight.train_batch(batch, step)

    store = CheckpointStore(tmp_path, keep=2)
    first = make_trainer(job)
    for step in (0, 1):
        first.train_batch(batches[step], step)
    progress = Progress(2, 2, first.controls.obrs_lambda, first.controls.state())
    path = store.save(progress, first.learnables)
    second = make_trainer(job)
    restored = store.load(path, second.learnables)
    assert restored == progress
    second.controls.restore(restored.obrs_lambda, restored.controls)
    for step in (2, 3):
        second.train_batch(batches[step], step)

    for role, model in straight.models.items():
        for expected, got in zip(model.parameters(), second.models[role].parameters(), strict=True):
            assert torch.equal(expected, got)
    assert second.controls.obrs_lambda == straight.controls.obrs_lambda != 1.0
    assert second.controls.state() == straight.controls.state()


def test_only_the_newest_checkpoints_are_kept_and_the_latest_is_found(
    tmp_path: Path, make_job: MakeJob, make_trainer: MakeTrainer
) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    assert store.latest() is None
    trainer = make_trainer(make_job())
    for step in (1, 2, 10):
        store.save(Progress(step, step, 1.0), trainer.learnables)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "00000010"]
    assert store.latest() == tmp_path / "00000010"


def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path, make_job: MakeJob, make_trainer: MakeTrainer) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    trainer = make_trainer(make_job())
    path = store.save(Progress(1, 1, 1.0), trainer.learnables)
    (path / "policy" / "optimizer.safetensors").write_bytes(b"torn")
    with pytest.raises(JackpotError, match="delete it to resume from an older one"):
        store.load(path, trainer.learnables)


def test_a_failed_write_leaves_the_previous_checkpoint(
    tmp_path: Path, make_job: MakeJob, make_trainer: MakeTrainer
) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    trainer = make_trainer(make_job())
    store.save(Progress(1, 1, 1.0), trainer.learnables)
    # A file where the next checkpoint is to be written aside fails as a full disk does: with an OSError on the way.
    blocked = CheckpointStore(tmp_path / "sub", keep=2)
    (tmp_path / "sub").rmdir()
    (tmp_path / "sub").write_text("not a directory")
    with pytest.raises(OSError):
        blocked.save(Progress(2, 2, 1.0), trainer.learnables)
    assert store.latest() == tmp_path / "00000001"
