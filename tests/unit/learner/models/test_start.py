"""Trainers as the learner's process builds them: number formats, compiled blocks, what is refused, profiles."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import gamma
from torch.distributed.tensor import DTensor

from jackpot.compute.ranks.group import join_ranks, leave_ranks
from jackpot.compute.ranks.loading import load_on_ranks
from jackpot.config import JobSpec, parse_job
from jackpot.config.environment import ServiceEnvironment
from jackpot.errors import ConfigError
from jackpot.learner.checkpoints.checkpoint_store import CheckpointStore, Progress
from jackpot.learner.checkpoints.checkpoint_tensors import tensors_of
from jackpot.learner.models.start import build_trainer, is_sharded, seed_everything
from jackpot.learner.trainer import Trainer
from jackpot.scoring.batch import build_batch

from ..conftest import MakeGroups, MakeJob, MakeTrainer, same_figures


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    yield
    leave_ranks()


def build(job: JobSpec, directory: Path) -> Trainer:
    return build_trainer(ServiceEnvironment(run_dir=directory, job_id="job"), job)[0]


def test_bfloat16_learns_on_float32_masters(
    tmp_path: Path, make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    """A step of 1e-6 is far below what bfloat16 resolves: it is there in the masters, and not lost for the next.

    States are rounded to bfloat16 some twelve times in each of two layers, gradients as often on their way back.
    """
    lr = ("learner.lr=1e-6", "learner.max_grad_norm=1.0")
    exact, job = make_job(*lr), make_job(*lr, "policy.dtype=bfloat16", "actor.dtype=bfloat16")
    assert not is_sharded(job)
    batch = build_batch(make_groups(exact), exact.algorithm.advantage)
    trainer, reference = build(job, tmp_path), make_trainer(exact)
    masters = trainer.models.learnables["policy"].model
    before = {name: p.detach().clone() for name, p in masters.named_parameters()}
    row, expected = trainer.train_batch(batch, 0)[0], reference.train_batch(batch, 0)[0]
    after = {name: p.detach() for name, p in masters.named_parameters()}
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in before])
    assert float((moved > 0).float().mean()) > 0.9 and float(moved.max()) < 2e-6
    error = gamma(2 * 2 * 12, torch.bfloat16)
    assert row["policy/grad_norm"] == pytest.approx(expected["policy/grad_norm"], rel=error)
    assert row["kl/policy_actor"] == pytest.approx(expected["kl/policy_actor"], rel=error)
    published = trainer.weights("policy")
    assert {tensor.dtype for tensor in published.values()} == {torch.bfloat16}
    assert all(torch.equal(published[name], after[name].bfloat16()) for name in published if name in after)


@pytest.mark.parametrize("penalty", [0.0, 0.1])
@pytest.mark.parametrize("max_batch_tokens", [16384, 60])
def test_a_copy_that_computes_learns_what_fsdp_would(
    tmp_path: Path, make_job: MakeJob, make_groups: MakeGroups, max_batch_tokens: int, penalty: float
) -> None:
    """To the bit: figures, weights and moments, over steps of one pass and of several."""
    job = make_job(
        "policy.dtype=bfloat16",
        "actor.dtype=bfloat16",
        f"learner.max_batch_tokens={max_batch_tokens}",
        f"algorithm.kl_penalty.weight={penalty}",
    )
    groups = make_groups(job)
    own = build(job, tmp_path)
    cpu = torch.device("cpu")
    ranks = join_ranks("learner", job.learner, cpu)
    models = [
        load_on_ranks(model.model, "float32", ranks, cpu, field="model") for model in (job.policy, job.rollout_model)
    ]
    sharded = Trainer(job, models[0], models[1], ranks)
    assert not any(isinstance(one, DTensor) for one in own.models["policy"].parameters())
    for step in range(3):
        batch = build_batch(groups, job.algorithm.advantage)
        assert own.train_batch(batch, step) == sharded.train_batch(batch, step)
    expected = tensors_of(sharded.models.learnables)
    found = tensors_of(own.models.learnables)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(found[name], whole), name


def test_a_resumed_step_in_bfloat16_is_the_same_to_the_bit(
    tmp_path: Path, make_job: MakeJob, make_groups: MakeGroups
) -> None:
    """What computes is taken up with the weights that it is a copy of."""
    # The canary's past versions are not in a checkpoint.
    job = make_job("policy.dtype=bfloat16", "actor.dtype=bfloat16", "alarms.canary_sequences=0")
    batch = build_batch(make_groups(job), job.algorithm.advantage)
    trainer, store = build(job, tmp_path), CheckpointStore(tmp_path / "checkpoints", keep=1)
    trainer.train_batch(batch, 0)
    path = store.save(
        Progress(1, 1, trainer.lambda_control.obrs_lambda, trainer.lambda_control.state()), trainer.models.learnables
    )
    expected = trainer.train_batch(batch, 1)
    resumed = build(job, tmp_path)
    resumed.restore(store, path)
    assert resumed.train_batch(batch, 1) == expected
    for role in ("policy", "actor"):
        published, again = trainer.weights(role), resumed.weights(role)
        assert all(torch.equal(again[name], tensor) for name, tensor in published.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.timeout(600),
                pytest.mark.skipif(
                    shutil.which("g++") is None or "JACKPOT_TEST_INDUCTOR" not in os.environ,
                    reason="needs g++ and JACKPOT_TEST_INDUCTOR=1: a minute of compiling",
                ),
            ],
        ),
    ],
)
def test_compiled_blocks_give_the_same_step(
    make_job: MakeJob,
    make_trainer: MakeTrainer,
    make_groups: MakeGroups,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    """Traced and differentiated ahead of time for every shape, together with checkpointing. The code generator behind
    it, torch's own, is left out where a minute is too long."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    rows = []
    for overrides in ([], ["learner.compile=true", "learner.activation_checkpointing=true"]):
        job = make_job("learner.max_batch_tokens=60", *overrides, actor="policy")
        trainer, batch = make_trainer(job), build_batch(make_groups(job), job.algorithm.advantage)
        rows.append(trainer.train_batch(batch, 0)[0])
    assert rows[1] == same_figures(rows[0], trainer, batch)


def test_a_profile_holds_the_steps_asked_for_after_the_first_batch(
    tmp_path: Path, make_job: MakeJob, make_groups: MakeGroups
) -> None:
    job = make_job("learner.profile_steps=2", "learner.updates_per_batch=2")
    trainer = build(job, tmp_path)
    for batch in range(3):
        trainer.train_batch(build_batch(make_groups(job, seed=batch), job.algorithm.advantage), 2 * batch)
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps-3-4-rank0.json"
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert any("addmm" in name for name in names) and any("AdamW" in name for name in names)


def test_a_sequence_beyond_the_limit_is_cut_and_counted(make_job: MakeJob, make_groups: MakeGroups) -> None:
    job = make_job()
    groups = make_groups(job)
    whole = build_batch(groups, job.algorithm.advantage)
    cut = build_batch(groups, job.algorithm.advantage, max_sequence_tokens=9)
    kept = [max(1, min(s.end - s.start, 9 - s.prompt_length)) for s in whole.sequences]
    assert [s.end - s.start for s in cut.sequences] == kept
    assert cut.num_cut_tokens == whole.num_tokens - sum(kept) > 0
    first = torch.cat([torch.arange(s.start, s.start + n) for s, n in zip(whole.sequences, kept, strict=True)])
    assert torch.equal(cut.tokens.actor_logprobs, whole.tokens.actor_logprobs[first])
    assert torch.equal(cut.tokens.advantages, whole.tokens.advantages[first])
    assert whole.num_cut_tokens == 0


def test_seeds_reach_every_generator() -> None:
    import random

    import numpy as np

    drawn = []
    for _ in range(2):
        seed_everything(2**40 + 5)
        drawn.append((random.random(), float(np.random.random()), float(torch.rand(()))))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("policy.dtype=float16", "policy.dtype = 'float16' cannot be trained.*Set it to bfloat16"),
        ("actor.dtype=float16", "actor.dtype = 'float16' cannot be trained"),
        ("learner={cpu_offload: true, device: cpu}", "cpu_offload brings parameters to a GPU"),
        ('learner={processes: 2, device: "cuda:0"}', "each process takes a GPU of its own"),
        ("learner.packing=sometimes", "packing"),
    ],
)
def test_settings_that_cannot_work_are_refused(make_job: MakeJob, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_job(override)


def test_a_frozen_actor_may_be_float16(make_job: MakeJob) -> None:
    job = make_job()
    data: dict[str, Any] = job.model_dump(mode="json")
    data["actor"] |= {"train": False, "dtype": "float16"}
    assert not is_sharded(parse_job(data))


def test_offload_without_a_gpu_is_refused(tmp_path: Path, make_job: MakeJob) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"learner\.cpu_offload = True: there is no GPU"):
        build(make_job("learner.cpu_offload=true"), tmp_path)


def test_compiling_without_a_compiler_is_refused(
    tmp_path: Path, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"learner\.compile = True: torch needs a compiler.*apt-get install g\+\+"):
        build(make_job("learner.compile=true", "learner.device=cpu"), tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", [False, True])
def test_bfloat16_on_a_gpu(
    tmp_path: Path, make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups, offload: bool
) -> None:
    job = make_job(
        "policy.dtype=bfloat16", "actor.dtype=bfloat16", "learner.device=cuda", f"learner.cpu_offload={offload}".lower()
    )
    batch = build_batch(make_groups(job), job.algorithm.advantage)
    expected = make_trainer(make_job()).train_batch(batch, 0)[0]
    trainer = build(job, tmp_path)
    row = trainer.train_batch(batch, 0)[0]
    assert row["policy/grad_norm"] == pytest.approx(expected["policy/grad_norm"], rel=0.1)
    assert row["kl/policy_actor"] == pytest.approx(expected["kl/policy_actor"], rel=0.1)
    # A checkpoint brings back weights, moments and counters: the second step is the same once more.
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    path = store.save(
        Progress(1, 1, trainer.lambda_control.obrs_lambda, trainer.lambda_control.state()), trainer.models.learnables
    )
    second = trainer.train_batch(batch, 1)[0]
    after = trainer.weights("policy")
    trainer.restore(store, path)
    assert trainer.train_batch(batch, 1)[0] == pytest.approx(second, rel=0.01, abs=1e-4)
    again = trainer.weights("policy")
    for name, tensor in after.items():
        torch.testing.assert_close(again[name], tensor, rtol=2**-7, atol=1e-4)
