from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from object_world import ObjectWorld, object_world

from jackpot.errors import JackpotError
from jackpot.learner.checkpoints.checkpoint_store import CheckpointStore, Progress
from jackpot.scoring.batch import build_batch
from jackpot.storage.object_directories import ObjectDirectories
from jackpot.storage.objects import Objects

from ..conftest import MakeGroups, MakeJob, MakeTrainer


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
    progress = Progress(2, 2, first.lambda_control.obrs_lambda, first.lambda_control.state())
    path = store.save(progress, first.models.learnables)
    second = make_trainer(job)
    restored = store.load(path, second.models.learnables)
    assert restored == progress
    second.lambda_control.restore(restored.obrs_lambda, restored.controls)
    for step in (2, 3):
        second.train_batch(batches[step], step)

    for role, model in straight.models.items():
        for expected, got in zip(model.parameters(), second.models[role].parameters(), strict=True):
            assert torch.equal(expected, got)
    assert second.lambda_control.obrs_lambda == straight.lambda_control.obrs_lambda != 1.0
    assert second.lambda_control.state() == straight.lambda_control.state()


def test_only_the_newest_checkpoints_are_kept_and_the_latest_is_found(
    tmp_path: Path, make_job: MakeJob, make_trainer: MakeTrainer
) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    assert store.latest() is None
    trainer = make_trainer(make_job())
    for step in (1, 2, 10):
        store.save(Progress(step, step, 1.0), trainer.models.learnables)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "00000010", "latest"]
    assert store.latest() == tmp_path / "00000010"


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path, make_job: MakeJob, make_trainer: MakeTrainer
) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    trainer = make_trainer(make_job())
    store.save(Progress(1, 1, 1.0), trainer.models.learnables)
    path = store.save(Progress(2, 2, 1.0), trainer.models.learnables)
    shard = next(path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4] + b"torn")  # of the right size, in the middle of a tensor
    latest = CheckpointStore(tmp_path, keep=2).latest()
    assert latest == tmp_path / "00000001"
    assert store.load(latest, trainer.models.learnables) == Progress(1, 1, 1.0)


def test_a_failed_write_leaves_the_previous_checkpoint(
    tmp_path: Path, make_job: MakeJob, make_trainer: MakeTrainer
) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    trainer = make_trainer(make_job())
    store.save(Progress(1, 1, 1.0), trainer.models.learnables)
    # A file where the next checkpoint is to be written aside fails as a full disk does: with an OSError on the way.
    blocked = CheckpointStore(tmp_path / "sub", keep=2)
    (tmp_path / "sub").rmdir()
    (tmp_path / "sub").write_text("not a directory")
    with pytest.raises(OSError):
        blocked.save(Progress(2, 2, 1.0), trainer.models.learnables)
    assert store.latest() == tmp_path / "00000001"


def test_training_goes_on_while_a_checkpoint_of_what_was_is_written(
    tmp_path: Path, make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    job = make_job()
    batches = [build_batch(make_groups(job, seed=seed), job.algorithm.advantage) for seed in range(2)]
    trainer, store = make_trainer(job), CheckpointStore(tmp_path, keep=2)
    trainer.train_batch(batches[0], 0)
    before = trainer.weights("policy")
    pending = trainer.begin_checkpoint(store, Progress(1, 1, 1.0))
    trainer.train_batch(batches[1], 1)
    assert store.latest() is None  # nobody sees it before it is whole
    path = pending.finish()
    restored = make_trainer(job)
    assert restored.restore(store, path).step == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in restored.weights("policy").items())
    assert not any(torch.equal(before[name], tensor) for name, tensor in trainer.weights("policy").items())
    assert not [file for file in path.rglob("*") if file.suffix not in (".safetensors", ".json")]


def test_the_checkpoint_of_the_best_policy_stays(tmp_path: Path, make_job: MakeJob, make_trainer: MakeTrainer) -> None:
    evaluations = tmp_path / "evaluations.jsonl"
    store = CheckpointStore(tmp_path / "checkpoints", keep=1, evaluations=evaluations)
    learnables = make_trainer(make_job()).models.learnables
    for step, accuracy in ((1, 1.0), (2, 0.75), (3, 0.6), (4, 0.1)):
        store.save(Progress(step, step, 1.0), learnables)
        with evaluations.open("a") as file:
            # Nearly all rewards of the first failed: its accuracy says nothing.
            file.write(json.dumps({"step": step, "policy_accuracy": accuracy, "comparable": step > 1}) + "\n")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000002", "00000004", "latest"]


def test_a_checkpoint_of_other_models_is_refused(
    tmp_path: Path, make_job: MakeJob, make_trainer: MakeTrainer, make_model: Callable[..., Path]
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    path = store.save(Progress(1, 1, 1.0), make_trainer(make_job()).models.learnables)
    wider = make_trainer(make_job(f"policy.model={make_model('qwen3', seed=1, hidden_size=48)}"))
    with pytest.raises(JackpotError, match="cannot be restored"):
        store.load(path, wider.models.learnables)


def test_a_checkpoint_that_cannot_be_written_says_so(
    tmp_path: Path, make_job: MakeJob, make_trainer: MakeTrainer
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    trainer = make_trainer(make_job())
    store.save(Progress(1, 1, 1.0), trainer.models.learnables)
    pending = store.begin(Progress(2, 2, 1.0), trainer.models.learnables)
    with suppress(BaseException):  # whatever became of the writing itself
        pending.writing.result(timeout=60)
    shutil.rmtree(pending.aside)
    with pytest.raises(JackpotError, match="could not be written"):
        pending.finish()
    assert store.latest() == tmp_path / "00000001"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectWorld]:
    with object_world() as world:
        for name, value in world.environ.items():
            monkeypatch.setenv(name, value)
        yield world


def test_checkpoints_in_a_bucket_are_read_on_another_machine(
    tmp_path: Path, make_job: MakeJob, make_trainer: MakeTrainer, bucket: ObjectWorld
) -> None:
    evaluations = tmp_path / "evaluations.jsonl"
    evaluations.write_text('{"step": 2, "policy_accuracy": 0.5}\n')
    stored = ObjectDirectories(Objects(bucket.url))
    here = CheckpointStore(tmp_path / "here", keep=2, evaluations=evaluations, stored=stored)
    assert here.latest() is None
    learnables = make_trainer(make_job()).models.learnables
    for step in (2, 4, 6, 8):
        here.save(Progress(step, step, 1.0), learnables)
    assert stored.names() == ["00000002", "00000006", "00000008"]  # the best, and the newest two
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["00000008"]
    assert set(here.steps) == {2, 6, 8}

    there = CheckpointStore(tmp_path / "there", keep=2, stored=stored)
    path = there.latest()
    assert path == tmp_path / "there" / "00000008"
    again = make_trainer(make_job())
    assert there.load(path, again.models.learnables) == Progress(8, 8, 1.0)

    # One that was written here and never reached the store: nothing counts as trained by it.
    shutil.copytree(path, path.with_name("00000010"))
    assert there.latest() == path and not path.with_name("00000010").exists()


def test_a_damaged_checkpoint_in_a_bucket_gives_way_to_the_one_before(
    tmp_path: Path,
    make_job: MakeJob,
    make_trainer: MakeTrainer,
    bucket: ObjectWorld,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stored = ObjectDirectories(Objects(bucket.url))
    learnables = make_trainer(make_job()).models.learnables
    store = CheckpointStore(tmp_path / "here", keep=2, stored=stored)
    for step in (1, 2):
        store.save(Progress(step, step, 1.0), learnables)
    (shard, *_) = [key for key in bucket.keys("runs/00000002/") if key.endswith(".safetensors")]
    bucket.spoil(shard)
    fresh = CheckpointStore(tmp_path / "there", keep=2, stored=stored)
    assert stored.pointed("latest") == "00000002"
    assert fresh.latest() == tmp_path / "there" / "00000001"
    assert re.search(r"checkpoint s3://\S*/00000002 is damaged.*safetensors does not match its manifest", caplog.text)
    # What is whole here already is not read again; what is damaged here is.
    assert store.latest() == tmp_path / "here" / "00000002"
    here = next((tmp_path / "here" / "00000002").glob("*.safetensors"))
    here.write_bytes(b"torn")
    assert store.latest() == tmp_path / "here" / "00000001"
    # The damaged one is the first to go.
    fresh.save(Progress(3, 3, 1.0), learnables)
    assert stored.names() == ["00000001", "00000003"] and stored.pointed("latest") == "00000003"


def test_a_checkpoint_that_the_bucket_does_not_take_says_so(
    tmp_path: Path, make_job: MakeJob, make_trainer: MakeTrainer, bucket: ObjectWorld
) -> None:
    stored = ObjectDirectories(Objects(bucket.url))
    store = CheckpointStore(tmp_path, keep=2, stored=stored)
    learnables = make_trainer(make_job()).models.learnables
    store.save(Progress(1, 1, 1.0), learnables)
    bucket.door.shut()
    with pytest.raises(JackpotError, match=r"cannot be .* now"):
        store.save(Progress(2, 2, 1.0), learnables)
    bucket.door.open()
    assert stored.names() == ["00000001"] and store.latest() == tmp_path / "00000001"
