"""Packed rows give what padded rows give: states, gradients, steps."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import model_rounding
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoConfig

from jackpot.compute.batching import AttentionCost
from jackpot.compute.forward import completion_hidden, packed_completion_hidden
from jackpot.compute.model_loading import load_causal_lm
from jackpot.compute.packing_trial import packs_exactly, problem_with_varlen
from jackpot.compute.pass_layout import layout_of
from jackpot.compute.ranks.group import Ranks, join_ranks, leave_ranks
from jackpot.compute.ranks.loading import load_on_ranks
from jackpot.compute.ranks.sharding import release, shard
from jackpot.compute.varlen import attends_by_lengths, is_available, switch
from jackpot.config import LearnerConfig
from jackpot.config.environment import ServiceEnvironment
from jackpot.errors import ConfigError
from jackpot.learner.models.start import build_trainer
from jackpot.learner.trainer import Trainer
from jackpot.scoring.batch import build_batch

from ..conftest import MakeGroups, MakeJob, MakeTrainer, same_figures


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_packed_states_are_those_of_padded_rows(make_model: Any, architecture: str) -> None:
    model = load_causal_lm(make_model(architecture, seed=3), "float32", "cpu")
    random = np.random.default_rng(0)
    sequences = [random.integers(3, 40, length) for length in (2, 9, 4, 30)]
    prompts = [1, 5, 3, 10]
    packed = packed_completion_hidden(model, sequences, prompts)
    padded = completion_hidden(model, sequences, prompts)
    torch.testing.assert_close(packed, padded, rtol=0, atol=model_rounding(model.config, 30, padded))
    assert packs_exactly(model)


def test_a_model_whose_code_raises_in_a_packed_row_is_not_packed(tmp_path: Path) -> None:
    """GPT-Neo's mask ends at its positions, and a row of several sequences is longer."""
    config = GPTNeoConfig(
        vocab_size=49,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=32,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path, "float32", "cpu")
    sequences = [np.arange(3, 3 + length) for length in (20, 20)]
    with pytest.raises(RuntimeError, match="must match the size"):
        packed_completion_hidden(model, sequences, [4, 4])
    assert not packs_exactly(model)


def test_a_step_is_the_same_however_it_is_laid_out_and_split(
    make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    groups = make_groups(make_job(), with_topk=True)
    found = []
    never, always, small = "learner.packing=never", "learner.packing=always", "learner.max_batch_tokens=25"
    for overrides in ([never], [always], [always, small], [], [small]):
        job = make_job("algorithm.correction={target: policy}", *overrides)
        trainer, batch = make_trainer(job), build_batch(groups, job.algorithm.advantage)
        row = trainer.train_batch(batch, 0)[0]
        grads = [p.grad for model in trainer.models.values() for p in model.parameters()]
        found.append((row, torch.cat([grad.flatten() for grad in grads])))
    for row, gradient in found[1:]:
        atol = model_rounding(trainer.models["policy"].config, 30, found[0][1], backward=True)
        torch.testing.assert_close(gradient, found[0][1], rtol=0, atol=atol)
        assert row == same_figures(found[0][0], trainer, batch)


def test_a_model_that_lets_packed_sequences_see_each_other_is_refused(
    make_job: MakeJob, make_trainer: MakeTrainer
) -> None:
    job = make_job("learner.packing=always")
    model = load_causal_lm(job.policy.model, "float32", "cpu")
    model.config._attn_implementation = "eager"
    trunk = model.base_model.forward
    # As an architecture that counts positions by itself would.
    model.base_model.forward = lambda **given: trunk(**{**given, "position_ids": None})
    with pytest.raises(ConfigError, match=r"learner\.packing = 'always'.*see each other.*Set it to never"):
        layout_of(job.learner.packing, [(model, torch.float32)], torch.device("cpu"))


def test_siblings_share_rows_where_both_models_can(
    make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    job = make_job()
    batch = build_batch(make_groups(job), job.algorithm.advantage)
    trainer = make_trainer(job)
    per_row = [one.per_row for one in trainer._plan(batch)]
    assert [sum(sizes) for sizes in per_row] == [len(batch.sequences)]
    assert max(per_row[0]) > 1
    assert {size for one in make_trainer(make_job("learner.packing=never"))._plan(batch) for size in one.per_row} == {1}
    policy, actor = (load_causal_lm(job.policy.model, "float32", "cpu") for _ in range(2))
    actor.set_attn_implementation("eager")
    models = [(policy, torch.float32), (actor, torch.float32)]
    assert layout_of(job.learner.packing, models, torch.device("cpu")).attention is None


def with_varlen(_device: torch.device, dtype: torch.dtype) -> bool:
    """As a GPU would have it; on a CPU a loop is in the kernel's place."""
    return dtype == torch.bfloat16


@pytest.mark.parametrize("packing", ["auto", "always"])
def test_models_that_compute_in_bfloat16_are_switched_and_packed(make_job: MakeJob, packing: str) -> None:
    job = make_job(f"learner.packing={packing}")
    models = [(load_causal_lm(job.policy.model, "float32", "cpu"), torch.bfloat16) for _ in range(2)]
    layout = layout_of(job.learner.packing, models, torch.device("cpu"), has_varlen=with_varlen)
    assert layout.packed
    assert (layout.attention is not None) == (packing == "auto")  # prompts worth sharing are shared
    assert all(attends_by_lengths(model) for model, _ in models)


@pytest.mark.parametrize(
    ("dtype", "has_varlen", "sees_all", "says"),
    [
        ("float32", True, True, "has no attention by lengths for float32 on this cpu"),
        ("bfloat16", False, True, "has no attention by lengths for bfloat16 on this cpu"),
        ("bfloat16", True, False, "layers that do not see the whole context"),
    ],
)
def test_without_attention_by_lengths_auto_lays_out_rows_and_says_why(
    make_job: MakeJob, caplog: pytest.LogCaptureFixture, dtype: str, has_varlen: bool, sees_all: bool, says: str
) -> None:
    job = make_job()
    policy, actor = (load_causal_lm(job.policy.model, "float32", "cpu") for _ in range(2))
    if not sees_all:
        actor.config.layer_types = ["full_attention", "sliding_attention"]
    models = [(policy, torch.bfloat16), (actor, getattr(torch, dtype))]
    with caplog.at_level("INFO"):
        layout = layout_of(
            job.learner.packing, models, torch.device("cpu"), has_varlen=with_varlen if has_varlen else is_available
        )
    assert not layout.packed
    assert (layout.attention is not None) == sees_all
    assert not any(attends_by_lengths(model) for model, _ in models)
    assert "sequences are not packed" in caplog.text and says in caplog.text


@dataclass(frozen=True, slots=True, eq=False)
class Told(Ranks):
    """A rank besides rank 0, and what that one says."""

    said: list[object] = field(default_factory=list)

    def broadcast(self, payload: bytes = b"") -> bytes:
        return json.dumps(self.said.pop(0)).encode()


@pytest.mark.parametrize("problem", [None, "Qwen3ForCausalLM lets packed sequences see each other"])
def test_other_ranks_try_too_and_do_as_rank_0_found(make_job: MakeJob, problem: str | None) -> None:
    job = make_job()
    model = load_causal_lm(job.policy.model, "float32", "cpu")
    ranks = Told(rank=1, size=2, said=[386.0, None, problem])
    layout = layout_of(
        job.learner.packing, [(model, torch.bfloat16)], torch.device("cpu"), ranks, has_varlen=is_available
    )
    assert layout.packed == attends_by_lengths(model) == (problem is None)
    assert layout.attention == AttentionCost(386.0)
    assert not ranks.said


def test_a_sharded_model_is_as_before_after_a_trial_that_broke_off(tmp_path: Path) -> None:
    """Amid a pass, with a block's parameters gathered."""
    config = Gemma2Config(
        vocab_size=49,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.4,
        layer_types=["full_attention"] * 2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    sequence, cpu = np.arange(3, 12), torch.device("cpu")
    try:
        ranks = join_ranks("learner", LearnerConfig(), cpu)
        model = load_on_ranks(str(tmp_path), "float32", ranks, cpu, field="policy.model")
        shard(model, ranks, None, field="policy.model")
        with torch.no_grad():
            before = completion_hidden(model, [sequence], [1])
            assert "its attention wants softcap" in str(problem_with_varlen(model))
        release(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())  # what an optimizer would get
        with torch.no_grad():
            assert torch.equal(completion_hidden(model, [sequence], [1]), before)
        release(model)
        completion_hidden(model, [sequence], [1]).square().sum().backward()
        release(model)
        assert all(parameter.grad is not None for parameter in model.base_model.parameters())
    finally:
        leave_ranks()


def test_always_packs_with_a_mask_where_a_model_cannot_be_switched(make_job: MakeJob) -> None:
    job = make_job("learner.packing=always")
    model = load_causal_lm(job.policy.model, "float32", "cpu")
    layout = layout_of(job.learner.packing, [(model, torch.float32)], torch.device("cpu"), has_varlen=with_varlen)
    assert layout.packed and layout.attention is None and not attends_by_lengths(model)


@pytest.mark.parametrize("prepared", [[], ["learner.activation_checkpointing=true"]])
@pytest.mark.parametrize("kappa", [None, 100.0])
def test_a_step_is_the_same_with_attention_by_lengths(
    make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups, prepared: list[str], kappa: float | None
) -> None:
    """Also where blocks are computed again in the backward pass, and where rows share a prompt. A small limit makes
    several passes."""
    penalty, small = "algorithm.kl_penalty.weight=0.1", "learner.max_batch_tokens=40"
    groups = make_groups(make_job())
    found = []
    for overrides in (["learner.packing=never"], ["learner.packing=always", small]):
        job = make_job(penalty, *overrides, *(prepared if found else []))
        trainer, batch = make_trainer(job), build_batch(groups, job.algorithm.advantage)
        if found:
            for model in (*trainer.models.values(), trainer.models.initial):
                switch(model)
            trainer.models.layout = replace(
                trainer.models.layout, attention=None if kappa is None else AttentionCost(kappa)
            )
        row = trainer.train_batch(batch, 0)[0]
        found.append((row, gradient_of(trainer)))
    assert found[1][0] == same_figures(found[0][0], trainer, batch)
    atol = model_rounding(trainer.models["policy"].config, 30, found[0][1], backward=True)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=atol)


def test_the_initial_policy_attends_as_the_policy_does(make_job: MakeJob) -> None:
    job = make_job("algorithm.kl_penalty.weight=0.1", actor="policy")
    policy = load_causal_lm(job.policy.model, "float32", "cpu")
    switch(policy)
    initial = Trainer(job, policy, None).models.initial
    assert initial is not None and attends_by_lengths(initial)
    assert not any(parameter.requires_grad for parameter in initial.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "prepared",
    [
        [],
        ["learner.activation_checkpointing=true"],
        pytest.param(
            ["learner.activation_checkpointing=true", "learner.compile=true"],
            marks=[
                pytest.mark.slow,
                pytest.mark.timeout(600),
                pytest.mark.filterwarnings("ignore"),
                pytest.mark.skipif(
                    "JACKPOT_TEST_INDUCTOR" not in os.environ, reason="needs gcc and JACKPOT_TEST_INDUCTOR=1"
                ),
            ],
        ),
    ],
)
def test_a_packed_bfloat16_step_on_a_gpu_is_that_of_rows_in_float32(
    tmp_path: Path, make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups, prepared: list[str]
) -> None:
    """Through FSDP, with grouped heads, the initial policy's pass, and several passes of different lengths."""
    penalty = "algorithm.kl_penalty.weight=0.1"
    half = ("policy.dtype=bfloat16", "actor.dtype=bfloat16", "learner.device=cuda")
    exact = make_job(penalty, "learner.packing=never")
    batch = build_batch(make_groups(exact), exact.algorithm.advantage)
    reference = make_trainer(exact)
    expected = reference.train_batch(batch, 0)[0]
    found = {}
    # With auto these short completions share their prompts; with always every pass goes through the kernel.
    for packing in ("auto", "always", "never"):
        job = make_job(penalty, *half, *prepared, f"learner.packing={packing}", "learner.max_batch_tokens=60")
        trainer = build_trainer(ServiceEnvironment(run_dir=tmp_path / packing, job_id="job"), job)[0]
        try:
            switched = [attends_by_lengths(model) for model in (*trainer.models.values(), trainer.models.initial)]
            assert switched == [packing != "never"] * 3
            assert trainer.models.layout.packed == (packing != "never")
            row = trainer.train_batch(batch, 0)[0]
            found[packing] = distance(gradient_of(trainer), gradient_of(reference))
        finally:
            leave_ranks()
        for name in ("policy/grad_norm", "kl/policy_actor"):
            assert row[name] == pytest.approx(expected[name], rel=0.1), (packing, name)
    # What rounding to bfloat16 costs in rows is what it may cost here.
    assert max(found["auto"], found["always"]) < max(0.05, 1.5 * found["never"])


def gradient_of(trainer: Trainer) -> torch.Tensor:
    """Of all models, [P] on the CPU; after a step that clips nothing."""
    gradients = [p.grad for model in trainer.models.values() for p in model.parameters() if p.grad is not None]
    whole = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in gradients]
    return torch.cat([grad.float().flatten().cpu() for grad in whole])


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative: what lies between them, over the length of the second."""
    return float((found - expected).norm() / expected.norm())
