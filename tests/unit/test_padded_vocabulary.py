"""Two models of one tokenizer whose output layers are padded to 288 and 320 rows: the first 288 are the vocabulary.

The reference is transformers in float64: its logits, cut at 288.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from job_world import jackpot_run, write_job
from patience import TEST_SECONDS
from safetensors import safe_open
from tolerances import model_rounding
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from jackpot.cli import app
from jackpot.compute.common_vocabulary import common_vocabulary
from jackpot.compute.model_inputs import check_group
from jackpot.compute.model_loading import load_causal_lm
from jackpot.compute.models import output_head, vocabulary_size
from jackpot.config import JobSpec, load_job, parse_job
from jackpot.control_plane.sessions.model_directories import check_models
from jackpot.errors import ConfigError, PayloadError
from jackpot.loop import Loop
from jackpot.orchestrator.deferral import Deferral
from jackpot.trajectory import Group, Trajectory

MakeModel = Callable[..., Path]
FEW, MANY = 288, 320

# The actor wider, as a larger or older sibling may be padded further; and the policy wider.
SIZES = [(FEW, MANY), (MANY, FEW)]


def job_of(make_model: MakeModel, sizes: tuple[int, int], *overrides: str) -> JobSpec:
    policy, actor = sizes
    data = {
        "policy": {"model": str(make_model("qwen3", seed=1, vocab_size=policy))},
        "actor": {
            "model": str(make_model("llama", seed=2, vocab_size=actor, hidden_size=16, num_hidden_layers=1)),
        },
        "task": {"name": "complement"},
        "sampling": {"group_size": 4, "max_tokens": 8, "temperature": 0.8},
        "learner": {"lr": 1e-2, "groups_per_batch": 4, "steps": 2},
        "evaluation": {"every": 2, "prompts": 2},
        "rollout": {"top_logprobs": 5},
    }
    return parse_job(data, overrides)


def exact_logprobs(model_dir: str, group: Group, trajectory: Trajectory) -> Tensor:
    """log-probabilities over the vocabulary at each token, [T, 288], in float64."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    ids = torch.from_numpy(np.r_[group.prompt_token_ids, trajectory.token_ids].astype(np.int64))
    with torch.no_grad():
        logits = model(ids[None, :-1]).logits[0, len(group.prompt_token_ids) - 1 :, :FEW]
    return torch.log_softmax(logits / group.temperature, dim=-1)


def bound(model_dir: str) -> float:
    """float32's rounding of a model's log-probabilities: of its states, and of logits of the size of these models'."""
    config = AutoModelForCausalLM.from_pretrained(model_dir).config
    return model_rounding(config, tokens=16, magnitude=30.0)


@pytest.mark.parametrize("sizes", SIZES, ids=["actor padded", "policy padded"])
def test_sampling_and_scores_are_those_of_the_common_rows(make_model: MakeModel, sizes: tuple[int, int]) -> None:
    job = job_of(make_model, sizes, "algorithm.correction={name: jackpot, normalizer: full}")
    assert not isinstance(job.actor, str)
    loop = Loop(job)
    groups = loop.sample()
    scored = loop.score(groups)
    for group, of_group in zip(groups, scored, strict=True):
        for trajectory, scores in zip(group.trajectories, of_group.scores, strict=True):
            actor = exact_logprobs(job.actor.model, group, trajectory)
            policy = exact_logprobs(job.policy.model, group, trajectory)
            ids = torch.from_numpy(trajectory.token_ids.astype(np.int64))[:, None]
            assert int(ids.max()) < FEW
            assert trajectory.topk_ids is not None
            np.testing.assert_array_equal(trajectory.topk_ids, actor.topk(5).indices)
            np.testing.assert_allclose(
                trajectory.actor_logprobs, actor.gather(1, ids)[:, 0], atol=bound(job.actor.model)
            )
            np.testing.assert_allclose(
                scores.target_logprobs, policy.gather(1, ids)[:, 0], atol=bound(job.policy.model)
            )
            # Z at λ, over all of the vocabulary.
            z = torch.minimum(actor.exp(), policy.exp() / of_group.obrs_lambda).sum(-1)
            np.testing.assert_allclose(scores.normalizer_head, z, atol=2 * bound(job.policy.model))


@pytest.mark.parametrize("sizes", SIZES, ids=["actor padded", "policy padded"])
def test_both_learn_from_the_common_rows_and_padding_gets_no_gradient(
    make_model: MakeModel, sizes: tuple[int, int]
) -> None:
    job = job_of(make_model, sizes)
    assert not isinstance(job.actor, str)
    loop = Loop(job)
    groups = [
        replace(g, trajectories=tuple(replace(t, reward=float(i % 2)) for i, t in enumerate(g.trajectories)))
        for g in loop.sample()
    ]
    (row, *_) = loop.learn(loop.score(groups))
    kl, entropy, count = 0.0, 0.0, 0
    for group in groups:
        for trajectory in group.trajectories:
            actor = exact_logprobs(job.actor.model, group, trajectory)
            policy = exact_logprobs(job.policy.model, group, trajectory)
            kl += float((policy.exp() * (policy - actor)).sum())
            entropy -= float((policy.exp() * policy).sum())
            count += trajectory.num_tokens
    tolerance = bound(job.policy.model) + bound(job.actor.model)
    assert row["kl/policy_actor"] == pytest.approx(kl / count, abs=tolerance)
    assert row["policy/entropy"] == pytest.approx(entropy / count, abs=tolerance)
    for role, rows in zip(("policy", "actor"), sizes, strict=True):
        gradients = loop.gradients(role)
        name = "lm_head.weight" if "lm_head.weight" in gradients else "model.embed_tokens.weight"
        assert gradients[name].shape[0] == rows
        assert gradients[name][:FEW].abs().sum() > 0
        assert torch.count_nonzero(gradients[name][FEW:]) == 0


def test_the_output_head_is_the_common_rows_and_the_model_keeps_its_own(make_model: MakeModel) -> None:
    model = load_causal_lm(make_model("llama", seed=2, vocab_size=MANY), "float32", "cpu", vocabulary=FEW)
    assert len(output_head(model).weight) == vocabulary_size(model) == FEW
    assert model.get_output_embeddings().weight.shape[0] == MANY
    assert output_head(model).weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    whole = load_causal_lm(make_model("llama", seed=2, vocab_size=MANY), "float32", "cpu")
    assert output_head(whole).weight is whole.get_output_embeddings().weight


def test_a_group_with_padding_in_it_is_refused_where_the_learner_scores(make_model: MakeModel) -> None:
    job = job_of(make_model, (MANY, FEW), "algorithm.correction=none", "scorer.reuse_reference=true")
    assert common_vocabulary(job) == FEW
    (group, *_) = Loop(job).sample()
    Deferral(job).defer(group, 0)
    group.trajectories[0].token_ids[0] = FEW
    with pytest.raises(PayloadError, match="beyond the vocabulary, 288"):
        Deferral(job).defer(group, 0)
    with pytest.raises(PayloadError):
        check_group(group, FEW, with_topk=False)


def test_fewer_common_rows_than_tokens_are_refused(make_model: MakeModel, tmp_path: Path) -> None:
    job = job_of(make_model, (FEW, 40))
    with pytest.raises(ConfigError, match="only 40 rows in common, and their tokenizer has 49 tokens"):
        check_models(job)
    check_models(job_of(make_model, (FEW, 49)))


@pytest.mark.timeout(TEST_SECONDS)
def test_a_job_on_differently_padded_models_is_valid_trains_and_exports_its_own_rows(
    tmp_path: Path, make_model: MakeModel
) -> None:
    job = write_job(tmp_path, lambda *args, **kw: make_model(*args, **kw, vocab_size=_rows(kw)), steps=2)
    told = CliRunner().invoke(app, ["validate", str(job)])
    assert told.exit_code == 0, told.output
    assert "the policy has rows for 288 token ids and the actor for 320" in told.output
    assert common_vocabulary(load_job(job)) == FEW
    with jackpot_run(
        str(job), "evaluation.every=2", f"--run-dir={tmp_path / 'run'}", directory=tmp_path / "run"
    ) as run:
        code, _, stderr = run.finish()
        assert code == 0, stderr + run.output()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    # Through all services: with padding in one of the two softmaxes they would be off.
    assert max(row["rollout/canary_max_difference"] for row in rows) < 1e-4
    for role, size in (("policy", FEW), ("actor", MANY)):
        with safe_open(tmp_path / "run" / "export" / role / "model.safetensors", framework="pt") as file:
            assert file.get_slice("model.embed_tokens.weight").get_shape()[0] == size


def _rows(settings: dict[str, int]) -> int:
    """The actor of a written job is the smaller model."""
    return MANY if "hidden_size" in settings else FEW
