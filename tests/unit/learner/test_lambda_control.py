"""λ and λ_distill as they follow measurements, and what a checkpoint keeps of them."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import figures_rounding, gamma

from jackpot.algorithm.budget import acceptance_at
from jackpot.algorithm.obrs import mean_acceptance
from jackpot.config import AlgorithmConfig
from jackpot.learner.lambda_control import LambdaControl
from jackpot.scoring.batch import build_batch
from jackpot.scoring.token_weights import token_weights
from jackpot.trajectory import ScoredGroup

from .conftest import MakeGroups, MakeJob, MakeTrainer, log_error, rescored


def algorithm(**sections: object) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate(sections)


def tokens(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(500, generator=generator), -torch.rand(500, generator=generator)


def test_constants_stay_as_they_are() -> None:
    lambda_control = LambdaControl(algorithm(correction={"obrs_lambda": 2.0}, distillation={"weight": 0.3}))
    lambda_control.observe_tokens(*tokens(0))
    lambda_control.observe_kl(5.0)
    assert (lambda_control.obrs_lambda, lambda_control.distillation_weight) == (2.0, 0.3)
    assert LambdaControl(algorithm(correction="tis")).obrs_lambda == 1.0


def test_lambda_goes_to_the_rate_at_once_and_then_follows_smoothly() -> None:
    lambda_control = LambdaControl(algorithm(correction={"acceptance_rate": 0.8, "lambda_smoothing": 0.5}))
    assert lambda_control.obrs_lambda == 1.0
    lambda_control.observe_tokens(*tokens(0))
    first = lambda_control.obrs_lambda
    assert acceptance_at(*tokens(0), first) == pytest.approx(0.8, abs=1e-6)
    shifted = tokens(0)[0] + 1.0, tokens(0)[1]
    lambda_control.observe_tokens(*shifted)  # every ratio e times larger: so is its λ
    # The tokens are float32: adding 1 rounds each ratio.
    assert lambda_control.obrs_lambda == pytest.approx(first * math.e**0.5, rel=gamma(4))


def test_an_agreement_that_comes_later_ends_rejection_at_once() -> None:
    """The smoothed λ of the past would reject every token at a rate that aligns nothing."""
    lambda_control = LambdaControl(algorithm(correction={"acceptance_rate": 0.9, "lambda_smoothing": 0.5}))
    lambda_control.observe_tokens(tokens(0)[0] + 1.0, tokens(0)[1])
    assert lambda_control.obrs_lambda > 1.0
    agreed = tokens(0)[1]
    lambda_control.observe_tokens(agreed, agreed)
    assert lambda_control.obrs_lambda == 1.0


def test_a_restored_controller_goes_on_as_if_nothing_had_happened() -> None:
    settings = algorithm(correction={"acceptance_rate": 0.9}, distillation={"kl_target": 0.2})
    whole, halves = LambdaControl(settings), LambdaControl(settings)
    for seed in range(3):
        for lambda_control in (whole, halves):
            lambda_control.observe_tokens(*tokens(seed))
            lambda_control.observe_kl(0.3 + 0.1 * seed)
    resumed = LambdaControl(settings)
    resumed.restore(halves.obrs_lambda, halves.state())
    for lambda_control in (whole, resumed):
        lambda_control.observe_tokens(*tokens(9))
        lambda_control.observe_kl(0.1)
    assert resumed.obrs_lambda == whole.obrs_lambda
    assert resumed.distillation_weight == whole.distillation_weight != 1.0
    assert resumed.state() == whole.state()


def test_groups_scored_with_different_lambdas_keep_their_own(make_job: MakeJob, make_groups: MakeGroups) -> None:
    job = make_job("algorithm.correction.c1=1e9")
    groups: list[ScoredGroup] = make_groups(job)
    mixed = [rescored(job, group, 0.5 if index < 2 else 2.0) for index, group in enumerate(groups)]
    batch = build_batch(mixed, job.algorithm.advantage)
    weights = token_weights(batch.tokens, job.algorithm.correction)

    lambdas = torch.cat([torch.full((group.group.num_tokens,), group.obrs_lambda) for group in mixed])
    assert set(lambdas.tolist()) == {0.5, 2.0}
    torch.testing.assert_close(weights.obrs_lambda, lambdas)
    ratio = (batch.tokens.reference_logprobs - batch.tokens.actor_logprobs).exp()
    torch.testing.assert_close(weights.acceptance_probs, (ratio / lambdas).clamp(max=1.0))
    torch.testing.assert_close(weights.raw_weight, weights.normalizer * torch.maximum(ratio, lambdas))
    # a · w = Z · s, token by token: only with the λ that each was scored with.
    torch.testing.assert_close(weights.acceptance_probs * weights.weight, weights.normalizer * ratio)
    mean = float(weights.normalizer.double().mean())  # head + τ · tail rounds three times
    assert mean == pytest.approx(mean_acceptance(weights.acceptance_probs), rel=gamma(3))


def test_a_training_step_steers_both(make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups) -> None:
    job = make_job(
        "algorithm.correction.acceptance_rate=0.7",
        "algorithm.distillation.kl_target=1e-3",
        "learner.actor_schedule={warmup_steps: 1}",
        "learner.schedule={warmup_steps: 3}",
    )
    trainer = make_trainer(job)
    batch = build_batch(make_groups(job), job.algorithm.advantage)
    row = trainer.train_batch(batch, first_step=0)[0]
    assert row["actor/distill_weight"] == 1.0 < trainer.lambda_control.distillation_weight
    assert row["rollout_corr/obrs_lambda"] == 1.0
    assert row["rollout_corr/obrs_lambda_next"] == trainer.lambda_control.obrs_lambda
    found = acceptance_at(
        batch.tokens.reference_logprobs, batch.tokens.actor_logprobs, trainer.lambda_control.obrs_lambda
    )
    assert found == pytest.approx(0.7, abs=1e-6)
    assert (row["policy/lr"], row["actor/lr"]) == (job.learner.lr / 4, job.learner.lr / 2)


def test_near_the_kl_target_the_actor_learns_more_slowly_and_at_the_target_not_at_all(
    make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    batch = build_batch(make_groups(make_job()), make_job().algorithm.advantage)
    kl = make_trainer(make_job()).train_batch(batch, first_step=0)[0]["kl/policy_actor"]
    # The rate is full at twice the target and falls with the logarithm: half of it at √2 times the target.
    for target, pace in ((kl / 2, 1.0), (kl / math.sqrt(2), 0.5), (2 * kl, 0.0)):
        job = make_job(f"algorithm.distillation.kl_target={target}")
        trainer = make_trainer(job)
        first = trainer.train_batch(batch, first_step=0)[0]
        assert first["actor/lr"] == job.learner.lr  # nothing is measured yet
        before = [parameter.clone() for parameter in trainer.models["actor"].parameters()]
        second = trainer.train_batch(batch, first_step=1)[0]
        assert second["policy/lr"] == job.learner.lr
        # The pace is log₂ of the KL over its target: an error of the KL is one of the pace, over log 2.
        error = figures_rounding({}, log_error(trainer, batch))["rel"] / math.log(2)
        assert second["actor/lr"] == pytest.approx(pace * job.learner.lr, rel=0, abs=error * job.learner.lr)
        after = trainer.models["actor"].parameters()
        stayed = all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        assert stayed == (pace == 0.0)


def test_with_the_policy_as_target_one_lambda_scores_all(
    make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    job = make_job("algorithm.correction={target: policy, acceptance_rate: 0.6}")
    trainer = make_trainer(job)
    batch = build_batch(make_groups(job, with_topk=True, disturb=0.0), job.algorithm.advantage)
    first = trainer.train_batch(batch, first_step=0)[0]
    second = trainer.train_batch(batch, first_step=1)[0]
    assert first["rollout_corr/obrs_lambda"] == 1.0
    assert second["rollout_corr/obrs_lambda"] == pytest.approx(first["rollout_corr/obrs_lambda_next"], rel=1e-6)
    assert second["rollout_corr/obrs_acceptance_rate"] == pytest.approx(0.6, abs=0.05)
