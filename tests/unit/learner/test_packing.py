"""Packed rows give what padded rows give: states, gradients, steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from jackpot.errors import ConfigError
from jackpot.learner import packing
from jackpot.learner.batch import build_batch
from jackpot.runtime.forward import completion_hidden, packed_completion_hidden
from jackpot.runtime.models import load_causal_lm

from .conftest import MakeGroups, MakeJob, MakeTrainer


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_packed_states_are_those_of_padded_rows(make_model: Any, architecture: str) -> None:
    model = load_causal_lm(make_model(architecture, seed=3), "float32", "cpu")
    random = np.random.default_rng(0)
    sequences = [random.integers(3, 40, length) for length in (2, 9, 4, 30)]
    prompts = [1, 5, 3, 10]
    packed = packed_completion_hidden(model, sequences, prompts)
    torch.testing.assert_close(packed, completion_hidden(model, sequences, prompts), rtol=0, atol=2e-5)
    assert packing.packs_exactly(model)


def test_a_step_is_the_same_however_it_is_laid_out_and_split(
    make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    groups = make_groups(make_job(), with_topk=True)
    found = []
    never, always, small = "learner.packing=never", "learner.packing=always", "learner.max_batch_tokens=25"
    for overrides in ([never], [always], [always, small], [], [small]):
        job = make_job("algorithm.correction={target: policy}", *overrides)
        trainer = make_trainer(job)
        row = trainer.train_batch(build_batch(groups, job.algorithm.advantage), 0)[0]
        grads = [p.grad for model in trainer.models.values() for p in model.parameters()]
        found.append((row, torch.cat([grad.flatten() for grad in grads])))
    for row, gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0][1], rtol=0, atol=1e-5 * float(found[0][1].abs().max()))
        assert row == pytest.approx(found[0][0], rel=1e-4, abs=1e-6)


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
        packing.layout_of(job.learner, [(model, "float32")], torch.device("cpu"))


def test_siblings_share_rows_where_both_models_can(
    make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    job = make_job()
    batch = build_batch(make_groups(job), job.algorithm.advantage)
    trainer = make_trainer(job)
    per_row = [one.per_row for one in trainer._passes(batch)]
    assert [sum(sizes) for sizes in per_row] == [len(batch.sequences)]
    assert max(per_row[0]) > 1
    assert {size for one in make_trainer(make_job("learner.packing=never"))._passes(batch) for size in one.per_row} == {
        1
    }
    policy, actor = (load_causal_lm(job.policy.model, "float32", "cpu") for _ in range(2))
    actor.set_attn_implementation("eager")
    models = [(policy, "float32"), (actor, "float32")]
    assert packing.layout_of(job.learner, models, torch.device("cpu")).attention_tokens is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_attention_packs_as_padded_rows_do(make_model: Any, make_job: MakeJob) -> None:
    pytest.importorskip("flash_attn")
    model = load_causal_lm(make_model("qwen3", seed=3), "bfloat16", "cuda")
    random = np.random.default_rng(0)
    sequences = [random.integers(3, 40, length) for length in (2, 9, 4, 30)]
    padded = completion_hidden(model, sequences, [1, 5, 3, 10]).float()
    layout = packing.layout_of(make_job("learner.packing=auto").learner, [(model, "bfloat16")], torch.device("cuda"))
    assert layout.packed
    torch.testing.assert_close(layout.states(model, sequences, [1, 5, 3, 10]).float(), padded, rtol=0.05, atol=0.05)
