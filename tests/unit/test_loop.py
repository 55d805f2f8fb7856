"""The loop in one process, on real tiny models: reproducible, exactly as stale as asked, and open to look into."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import figures_rounding, gamma, model_rounding

import jackpot.loop
from jackpot.config import JobSpec, parse_job
from jackpot.errors import ConfigError, RewardError
from jackpot.experiment.inline import Curve, run_loop
from jackpot.loop import Loop
from jackpot.trajectory import Role

MakeJob = Callable[..., JobSpec]


@pytest.fixture
def make_job(make_model: Callable[..., Path]) -> MakeJob:
    def make(*overrides: str) -> JobSpec:
        data: dict[str, Any] = {
            "policy": {"model": str(make_model("qwen3", seed=1))},
            "actor": {"model": str(make_model("qwen3", seed=2, hidden_size=16, num_hidden_layers=1))},
            "task": {"name": "python:tests_experiment_task:DigitTask"},
            "sampling": {"group_size": 4, "max_tokens": 6},
            "learner": {"lr": 1e-2, "groups_per_batch": 2, "steps": 3},
            "evaluation": {"every": 2, "prompts": 8},
            "rollout": {"top_logprobs": 5},
        }
        return parse_job(data, overrides)

    return make


class DigitTask:
    """Rewards completions with many digits: random models do earn some."""

    num_prompts = 16

    def __init__(self, params: object, seed: int) -> None:
        self._seed = seed

    def train_prompt(self, index: int) -> Any:
        from jackpot.orchestrator.tasks import TaskItem

        return TaskItem(f"{(index + self._seed) % 10}+1=")

    def eval_items(self, count: int) -> Any:
        return [self.train_prompt(index) for index in range(count)]

    def reward(self, item: object, completion: str) -> float:
        return float(sum(character.isdigit() for character in completion) >= 2)


@pytest.fixture(autouse=True)
def digit_task(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    module = ModuleType("tests_experiment_task")
    module.DigitTask = DigitTask  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tests_experiment_task", module)


def curve(job: JobSpec, staleness: int = 0, reference_age: int = 0) -> Curve:
    return run_loop(Loop(job, staleness=staleness, reference_age=reference_age))


def test_the_same_seed_gives_the_identical_curve_and_another_seed_another(make_job: MakeJob) -> None:
    first, second, other = curve(make_job()), curve(make_job()), curve(make_job("seed=1"))
    assert first.evaluations == second.evaluations
    assert first.steps == second.steps
    assert [step for step, _ in first.evaluations] == [0, 2, 3]
    assert first.steps != other.steps
    assert first.num_trajectories == 3 * 2 * 4
    assert {row["reward/mean"] for row in first.steps} != {0.0}


@pytest.mark.parametrize(("staleness", "expected"), [(0, [0, 0, 0, 0]), (1, [0, 1, 1, 1]), (2, [0, 1, 2, 2])])
def test_sampling_is_as_stale_as_told(make_job: MakeJob, staleness: int, expected: list[int]) -> None:
    found = curve(make_job("learner.steps=4"), staleness)
    assert [row["staleness/mean"] for row in found.steps] == expected
    assert [row["staleness/max"] for row in found.steps] == expected


def test_weights_that_sampled_and_weights_that_score_are_the_very_ones(make_job: MakeJob) -> None:
    """On-policy, with scorer and sampler of one age, the ratio is 1; with a newer scorer it is not after an update."""
    job = make_job("actor=policy", "algorithm.correction=is")
    together, apart = curve(job, 1, 1), curve(job, 1, 0)
    # Decoded token by token and passed as a whole: two log p of at most 20 in magnitude, on 4 + 6 tokens.
    error = model_rounding(Loop(job).policy.config, 4 + 6, 20.0)
    for row in together.steps:
        assert row["rollout_corr/rollout_is_max"] == pytest.approx(1, rel=error)
    assert apart.steps[0]["rollout_corr/rollout_is_max"] == pytest.approx(1, rel=error)
    assert all(row["rollout_corr/rollout_is_max"] > 1.01 for row in apart.steps[1:])
    # Only an old reference lets the policy's ratio move away from 1.
    assert max(abs(row["policy/clip_fraction"]) for row in apart.steps) == 0


def test_full_normalizer_uses_the_actor_that_sampled(make_job: MakeJob) -> None:
    found = curve(make_job("algorithm.correction={name: jackpot, normalizer: full}"), 1)
    for row in found.steps:
        assert 0 < row["rollout_corr/obrs_normalizer"] < 1
        assert row["rollout_corr/kl_after_exact"] < row["rollout_corr/kl_before_exact"]


def test_many_updates_a_batch_and_the_policy_as_target(make_job: MakeJob) -> None:
    overrides = [
        "learner.steps=4",
        "learner.updates_per_batch=2",
        "algorithm.correction={name: jackpot, target: policy}",
    ]
    found = curve(make_job(*overrides))
    assert [row["step"] for row in found.steps] == [1, 2, 3, 4]
    assert [row["staleness/mean"] for row in found.steps] == [0, 1, 0, 1]
    assert [step for step, _ in found.evaluations] == [0, 2, 4]


def test_the_policy_as_target_passes_each_model_no_more_often_than_its_scores_and_losses_need(
    make_job: MakeJob,
) -> None:
    """One pass scores and one trains the policy as the reference; the actor's only pass is that of its own loss."""
    correction = "algorithm.correction={name: jackpot, target: policy, normalizer: union_kappa}"
    loop = Loop(make_job(correction, "alarms.canary_sequences=0"))
    groups = loop.sample()
    passes = {"policy": 0, "actor": 0}

    def count(role: Role) -> Callable[..., None]:
        def hook(*_: object) -> None:
            passes[role] += 1

        return hook

    for role, model in loop.trainer.models.items():
        model.base_model.register_forward_hook(count(role))
    scored = loop.score(groups)
    assert passes == {"policy": 1, "actor": 0}
    loop.learn(scored)
    assert passes == {"policy": 2, "actor": 1}


def test_a_reference_from_the_learners_own_pass_is_the_scorers(make_job: MakeJob) -> None:
    """The first step's; it needs the actor's candidates, which the scorer then passes on."""
    found, expected = (curve(make_job("learner.steps=1", f"scorer.reuse_reference={reuse}")) for reuse in (True, False))
    error = model_rounding(Loop(make_job()).policy.config, 4 + 6, 20.0)
    assert found.steps[0] == pytest.approx(dict(expected.steps[0]), **figures_rounding(expected.steps[0], error))


def test_steps_by_hand_are_the_whole_run(make_job: MakeJob) -> None:
    job = make_job("learner.steps=4", "learner.updates_per_batch=2")
    whole, loop = curve(job, 1, 1), Loop(job, staleness=1, reference_age=1)
    rows = []
    while loop.batch < job.num_batches:
        groups = loop.sample()
        again = loop.sample()
        for group, same in zip(groups, again, strict=True):
            for one, other in zip(group.trajectories, same.trajectories, strict=True):
                np.testing.assert_array_equal(one.token_ids, other.token_ids)
        rows += loop.learn(loop.score(groups))
    assert tuple(rows) == whole.steps
    assert len(loop.weighed) == 2  # the steps of the latest batch alone
    assert loop.evaluate() == whole.evaluations[-1][1]


def test_no_more_trajectories_are_decoded_together_than_allowed(make_job: MakeJob) -> None:
    """Whole groups at a time, of four; what is sampled does not depend on it."""
    sampled = []
    for allowed in (64, 4):
        loop = Loop(make_job(f"rollout.max_batch_size={allowed}"))
        assert loop.actor is not None
        rows: list[int] = []
        loop.actor.base_model.register_forward_hook(lambda *given, rows=rows: rows.append(len(given[-1][0])))
        sampled.append([t.token_ids.tolist() for group in loop.sample() for t in group.trajectories])
        assert max(rows) == min(allowed, 8)
    assert sampled[0] == sampled[1]


@pytest.mark.parametrize("reward", [float("nan"), "much"])
def test_a_reward_that_is_no_number_is_refused(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, reward: object
) -> None:
    loop = Loop(make_job())
    monkeypatch.setattr(DigitTask, "reward", lambda *_: reward)
    with pytest.raises(RewardError, match="not a finite number"):
        loop.sample()


def test_tokens_weights_and_gradients_can_be_looked_at_between_steps(make_job: MakeJob) -> None:
    """The weights are those of Algorithm 1 on the scores that were seen before; AdamW's first step is lr · sign(g)."""
    correction = "algorithm.correction={name: jackpot, normalizer: full, obrs_lambda: 1.5, c1: 2}"
    loop = Loop(make_job(correction, "learner.max_grad_norm=1e9"))
    before = {role: {n: p.detach().clone() for n, p in m.named_parameters()} for role, m in loop.trainer.models.items()}
    scored = loop.score(loop.sample())
    loop.learn(scored)
    (step,) = loop.weighed
    for group in scored:
        for trajectory, scores in zip(group.group.trajectories, group.scores, strict=True):
            assert len(loop.token_texts(trajectory)) == trajectory.num_tokens
            own = step.of(trajectory)
            ratio = np.exp(scores.target_logprobs.astype(np.float64) - trajectory.actor_logprobs)
            expected = np.minimum(scores.normalizer_head * np.maximum(1.5, ratio), 2)
            # The difference of logarithms of at most 20 rounds by 20 u; its exponential and the products by u each.
            np.testing.assert_allclose(own.weight.numpy(), expected, rtol=gamma(24))
            np.testing.assert_array_equal(own.mask.numpy(), scores.mask)
    for role, model in loop.trainer.models.items():
        gradients = loop.gradients(role)
        moved = {name: parameter.detach() - before[role][name] for name, parameter in model.named_parameters()}
        assert gradients.keys() == moved.keys()
        clear = torch.cat([g.abs().flatten() for g in gradients.values()]) > 1e-5  # against AdamW's ε of 1e-8
        signs = torch.cat([(-g).sign().flatten() for g in gradients.values()])
        assert clear.any()
        assert torch.equal(torch.cat([m.flatten() for m in moved.values()]).sign()[clear], signs[clear])


def test_text_is_that_of_each_token(make_job: MakeJob) -> None:
    """The tokenizer is one of characters: pieces and whole are the same text but for special tokens."""
    loop = Loop(make_job())
    trajectory = loop.sample()[0].trajectories[0]
    assert "".join(loop.token_texts(trajectory)) == loop._tokenizer.decode(trajectory.token_ids)


def test_the_example_of_the_module_runs(make_job: MakeJob) -> None:
    parsed = doctest.DocTestParser().get_doctest(jackpot.loop.__doc__ or "", {"job": make_job()}, "loop", None, 0)
    assert len(parsed.examples) > 8
    result = doctest.DocTestRunner().run(parsed)
    assert result.failed == 0


def test_an_acceptance_rate_is_followed(make_job: MakeJob) -> None:
    found = curve(make_job("algorithm.correction={name: jackpot, acceptance_rate: 0.5}", "learner.steps=4"))
    used = [row["rollout_corr/obrs_lambda"] for row in found.steps]
    published = [row["rollout_corr/obrs_lambda_next"] for row in found.steps]
    assert used == pytest.approx([1.0, *published[:-1]], rel=1e-6)
    assert published[0] != 1.0


@pytest.mark.parametrize("role", ["policy", "actor"])
def test_a_model_that_diverged_ends_the_run_with_its_reason(make_job: MakeJob, role: Role) -> None:
    loop = Loop(make_job("learner.steps=6"), staleness=0, reference_age=0)

    def diverge(step: int, accuracy: float) -> None:
        if step == 2:
            for parameter in loop.trainer.models[role].parameters():
                parameter.data.fill_(float("nan"))

    found = run_loop(loop, diverge)
    assert found.failure is not None and "not finite" in found.failure
    assert [step for step, _ in found.evaluations] == [0, 2, 6]
    assert len(found.steps) == 2


@pytest.mark.parametrize(
    ("overrides", "ages", "field"),
    [
        (["algorithm.advantage.filter_zero_variance=true"], (0, 0), "algorithm.advantage.filter_zero_variance"),
        ([], (0, 1), "reference_age"),
    ],
)
def test_what_only_the_services_do_is_refused(
    make_job: MakeJob, overrides: list[str], ages: tuple[int, int], field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Loop(make_job(*overrides), staleness=ages[0], reference_age=ages[1])
    assert caught.value.field == field
