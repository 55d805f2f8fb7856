"""The training step against a literal float64 transcription of the paper's equations on whole logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import gamma, model_rounding, rounding
from torch import Tensor

from jackpot.compute.model_loading import load_causal_lm
from jackpot.config import JobSpec
from jackpot.scoring.batch import build_batch
from jackpot.scoring.passes import ModelPasses
from jackpot.scoring.step_scores import score_step
from jackpot.trajectory import ScoredGroup, TokenScores, Trajectory

from .conftest import MakeGroups, MakeJob, MakeTrainer, full_logprobs, log_error, same_figures


def literal_loss(job: JobSpec, groups: Sequence[ScoredGroup], policy: Any, actor: Any) -> Tensor:
    """eq. 5 + eq. 6 + λ_distill · eq. 7, token by token."""
    correction, algorithm = job.algorithm.correction, job.algorithm
    pairs = [(group, t, s) for group in groups for t, s in zip(group.group.trajectories, group.scores, strict=True)]
    accept = np.concatenate([s.acceptance_probs for *_, s in pairs]).astype(np.float64)
    head = np.concatenate([s.normalizer_head for *_, s in pairs]).astype(np.float64)
    tail = np.concatenate([s.normalizer_tail for *_, s in pairs]).astype(np.float64)
    tau = min(max((accept.mean() - head.mean()) / tail.mean(), 0.0), 1.0)
    policy_sum, actor_sum, distill_sum = torch.zeros(3, dtype=torch.float64)
    accepted, total = 0.0, 0
    for group, trajectory, score in pairs:
        rewards = np.array([t.reward for t in group.group.trajectories])
        spread = rewards.std(ddof=1)
        advantage = 0.0 if spread == 0 else (trajectory.reward - rewards.mean()) / (spread + 1e-6)
        p_new = full_logprobs(policy, group.group.prompt_token_ids, trajectory.token_ids)
        p_omega = full_logprobs(actor, group.group.prompt_token_ids, trajectory.token_ids)
        for i, token in enumerate(trajectory.token_ids.astype(int)):
            p_ref, p_inf = float(score.target_logprobs[i]), float(trajectory.actor_logprobs[i])
            ratio = torch.exp(p_new[i, token] - p_ref)
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            if correction.name == "jackpot":
                z = score.normalizer_head[i] + tau * score.normalizer_tail[i]
                rho = min(z * max(correction.obrs_lambda, np.exp(p_ref - p_inf)), correction.c1)
                mask = float(score.acceptance_probs[i] if correction.mask == "expected" else score.mask[i])
            else:
                rho, mask = plain_weight(job, trajectory, score, i), 1.0
            policy_sum = policy_sum - rho * mask * surrogate
            accepted += mask
            total += 1
            weight = min(np.exp(float(p_omega[i, token].detach()) - p_inf), algorithm.actor_cap)
            omega_ratio = torch.exp(p_omega[i, token] - p_omega[i, token].detach())
            actor_sum = actor_sum - weight * omega_ratio * advantage
            teacher = p_new[i].detach()
            distill_sum = distill_sum + (teacher.exp() * (teacher - p_omega[i])).sum()
    denominator = accepted if algorithm.denominator == "accepted" else total
    return policy_sum / denominator + (actor_sum + algorithm.distillation.weight * distill_sum) / total


def plain_weight(job: JobSpec, trajectory: Trajectory, score: TokenScores, i: int) -> float:
    """F of the corrections without rejection, at token i."""
    correction = job.algorithm.correction
    s = np.exp(score.target_logprobs.astype(np.float64) - trajectory.actor_logprobs)
    whole = correction.name == "mis" or getattr(correction, "level", "token") == "sequence"
    ratio = float(s.prod() if whole else s[i])
    match correction.name:
        case "is":
            return ratio
        case "tis":
            return min(ratio, correction.cap)
        case "icepop":
            return ratio if correction.low <= ratio <= correction.high else 0.0
        case "mis":
            return ratio if ratio <= correction.cap else 0.0
    return 1.0


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=tolerance * scale, msg=name)


def relative_rounding(model: Any) -> float:
    """Of a gradient of the model on rows of up to 30 tokens, over its largest element."""
    return model_rounding(model.config, 30, 1.0, backward=True)


SETTINGS = [
    ["algorithm.correction=jackpot"],
    ["algorithm.correction=jackpot", "algorithm.correction.mask=expected", "algorithm.correction.c1=1.1"],
    ["algorithm.correction=jackpot", "algorithm.denominator=all", "algorithm.distillation.weight=0.3"],
    ["algorithm.correction=tis"],
    ["algorithm.correction=tis", "algorithm.correction.level=sequence"],
    ["algorithm.correction=is"],
    ["algorithm.correction=icepop", "algorithm.correction.high=1.1"],
    ["algorithm.correction=mis"],
    ["algorithm.correction=none"],
]


@pytest.mark.parametrize("overrides", SETTINGS, ids=lambda overrides: overrides[-1])
def test_gradients_are_those_of_the_papers_equations(
    make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups, overrides: list[str]
) -> None:
    job = make_job(*overrides)
    groups = make_groups(job)
    policy, actor = (load_causal_lm(path, "float32", "cpu") for path in (job.policy.model, job.actor.model))
    policy.double(), actor.double()
    literal_loss(job, groups, policy, actor).backward()

    trainer = make_trainer(job)
    trainer.train_batch(build_batch(groups, job.algorithm.advantage), first_step=0)

    for role, model in (("policy", policy), ("actor", actor)):
        assert_same(gradients(trainer.models[role]), gradients(model), relative_rounding(model))


def test_kl_penalty_pulls_towards_the_policy_that_the_job_began_with(
    make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    job = make_job("algorithm.kl_penalty.weight=0.5", "learner.lr=3e-3")
    groups = make_groups(job)
    trainer = make_trainer(job)
    batch = build_batch(groups, job.algorithm.advantage)
    first = trainer.train_batch(batch, first_step=0)[0]
    # The same model twice: k3 of two log p is (Δ²)/2, but its terms of size 1 are rounded; weights are at most c1.
    most = job.algorithm.correction.c1
    assert first["policy/kl_initial"] == pytest.approx(
        0.0, abs=most * (log_error(trainer, batch) ** 2 + rounding(3, 1.0))
    )
    assert first["policy/kl_initial_clipped_fraction"] == 0.0
    for step in range(1, 4):
        later = trainer.train_batch(batch, first_step=step)[0]
    assert later["policy/kl_initial"] > 1e-3

    # The gradient's extra part is β times that of the estimate, weighted as the loss is.
    grads = {}
    for weight in (0.0, 0.5):
        other = make_trainer(make_job(f"algorithm.kl_penalty.weight={weight}", "algorithm.kl_penalty.estimator=k2"))
        disturb(other.models["policy"])
        other.train_batch(batch, first_step=0)
        grads[weight] = gradients(other.models["policy"])
    literal = load_causal_lm(job.policy.model, "float32", "cpu")
    disturb(literal)
    literal.double(), (initial := load_causal_lm(job.policy.model, "float32", "cpu")).double()
    weights = trainer._reference_weights(batch, [batch])[0]
    coefficients = (weights.weight * weights.mask).double() / weights.mask.double().sum()
    total = torch.zeros((), dtype=torch.float64)
    for sequence in batch.sequences:
        split = sequence.input_ids[: sequence.prompt_length], sequence.input_ids[sequence.prompt_length :]
        p_new, p_initial = full_logprobs(literal, *split), full_logprobs(initial, *split).detach()
        for i, token in enumerate(split[1]):
            total = total + coefficients[sequence.start + i] * 0.5 * (p_new[i, token] - p_initial[i, token]).square()
    (0.5 * total).backward()
    extra = {name: grads[0.5][name] - grads[0.0][name] for name in grads[0.0]}
    # A difference of two gradients, whose errors are of their size and not of its own.
    scales = (max(float(one.abs().max()) for one in each.values()) for each in (grads[0.5], gradients(literal)))
    assert_same(extra, gradients(literal), 2 * relative_rounding(literal) * next(scales) / next(scales))


@pytest.mark.parametrize(("reuse", "updates"), [(False, 1), (False, 2), (True, 1)])
def test_kl_in_the_reward_is_taken_off_before_advantages_are_made(
    make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups, reuse: bool, updates: int
) -> None:
    """As if the task had paid R − β·Σ log(p_ref/p_initial), which is worked out here on whole rows in float64."""
    common = ["algorithm.correction=tis", f"scorer.reuse_reference={reuse}", f"learner.updates_per_batch={updates}"]
    job = make_job("algorithm.kl_penalty={weight: 0.5, applied_to: reward}", *common)
    groups = make_groups(make_job("algorithm.correction=tis"))
    initial, reference = (load_causal_lm(job.policy.model, "float32", "cpu") for _ in range(2))
    trainer = make_trainer(job)
    if reuse:
        disturb(trainer.models["policy"])
        disturb(reference)
    paid = [with_kl_paid(scored, initial, reference if reuse else None, 0.5) for scored in groups]
    plain = make_trainer(make_job(*common))
    if reuse:
        disturb(plain.models["policy"])
    rows = trainer.train_batch(build_batch(groups, job.algorithm.advantage), first_step=0)
    expected = plain.train_batch(build_batch(paid, job.algorithm.advantage), first_step=0)
    # Each penalty is a sum of differences of up to 11 pairs of log p; a group's rewards spread by std.
    rewards = [np.array([t.reward for t in scored.group.trajectories], dtype=np.float64) for scored in paid]
    std = min(float(of_group.std(ddof=1)) for of_group in rewards)
    advantage_error = 0.5 * 11 * 2 * log_error(trainer, build_batch(groups, job.algorithm.advantage)) / std
    for role, model in trainer.models.items():
        assert_same(gradients(model), gradients(plain.models[role]), 2 * advantage_error + relative_rounding(model))
    tasks = np.array([t.reward for scored in groups[: len(groups) // updates] for t in scored.group.trajectories])
    assert rows[0]["reward/mean"] == pytest.approx(tasks.mean()) != expected[0]["reward/mean"]
    assert rows[0]["policy/kl_initial_clipped_fraction"] == 0.0


def with_kl_paid(scored: ScoredGroup, initial: Any, reference: Any | None, weight: float) -> ScoredGroup:
    """The group with rewards less the penalty; p_ref is the scorer's where no reference is given."""
    prompt, paid = scored.group.prompt_token_ids, []
    for trajectory, scores in zip(scored.group.trajectories, scored.scores, strict=True):
        ids = trajectory.token_ids.astype(int)
        places = np.arange(len(ids))
        p_ref = scores.target_logprobs.astype(np.float64)
        if reference is not None:
            p_ref = full_logprobs(reference, prompt, ids)[places, ids].detach().numpy()
        kl = p_ref - full_logprobs(initial, prompt, ids)[places, ids].detach().numpy()
        paid.append(replace(trajectory, reward=trajectory.reward - weight * float(kl.sum())))
    return replace(scored, group=replace(scored.group, trajectories=tuple(paid)))


def disturb(model: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("normalization", ["sequence", "constant"])
def test_normalization_reaches_policy_and_actor(
    make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups, normalization: str
) -> None:
    job = make_job(
        f"algorithm.loss_normalization={normalization}", "algorithm.loss_constant_length=5", "algorithm.correction=tis"
    )
    groups = make_groups(job)
    batch = build_batch(groups, job.algorithm.advantage)
    trainer = make_trainer(job)
    row = trainer.train_batch(batch, first_step=0)[0]
    total = {"policy": 0.0, "actor": 0.0}
    policy, actor = (load_causal_lm(path, "float32", "cpu") for path in (job.policy.model, job.actor.model))
    for sequence in batch.sequences:
        prompt, ids = np.split(sequence.input_ids, [sequence.prompt_length])
        own = slice(sequence.start, sequence.end)
        advantage, sampled = batch.tokens.advantages[own].double(), batch.tokens.actor_logprobs[own].double()
        reference = batch.tokens.reference_logprobs[own].double()
        size = len(ids) if normalization == "sequence" else 5
        p_new, p_omega = (full_logprobs(model, prompt, ids)[range(len(ids)), ids].detach() for model in (policy, actor))
        ratio = (p_new - reference).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        total["policy"] -= float(((reference - sampled).exp().clamp(max=2.0) * surrogate).sum()) / size
        total["actor"] -= float(((p_omega - sampled).exp().clamp(max=2.0) * advantage).sum()) / size
    expected = {"policy/loss": total["policy"], "actor/ppo_loss": total["actor"]}
    expected = {name: value / len(batch.sequences) for name, value in expected.items()}
    assert {name: row[name] for name in expected} == same_figures(expected, trainer, batch)


def test_gradients_do_not_depend_on_the_split_into_micro_batches(
    make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    whole, split = make_job(), make_job("learner.max_batch_tokens=20")
    groups = make_groups(whole)
    results = []
    for job in (whole, split):
        trainer, batch = make_trainer(job), build_batch(groups, job.algorithm.advantage)
        row = trainer.train_batch(batch, first_step=0)[0]
        results.append((gradients(trainer.models["policy"]), gradients(trainer.models["actor"]), row))
    for place, role in enumerate(("policy", "actor")):
        assert_same(results[1][place], results[0][place], relative_rounding(trainer.models[role]))
    assert results[1][2] == same_figures(results[0][2], trainer, batch)


def test_policy_as_target_equals_reference_as_target_while_both_are_the_same_model(
    make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    job = make_job("algorithm.correction=jackpot", "algorithm.correction.target=policy")
    groups = make_groups(job, with_topk=True, disturb=0.0)
    trainer = make_trainer(job)
    batch = build_batch(groups, job.algorithm.advantage)
    policy = ModelPasses(trainer.models["policy"], batch.sequences, trainer._plan(batch))
    weights = score_step(job, batch, policy, trainer.lambda_control.obrs_lambda).weights
    error = log_error(trainer, batch)  # an absolute one of log p, and so a relative one of what is at most 1
    torch.testing.assert_close(weights.target_logprobs, batch.tokens.reference_logprobs, rtol=0, atol=error)
    torch.testing.assert_close(weights.acceptance_probs, batch.tokens.acceptance_probs, rtol=0, atol=error)
    torch.testing.assert_close(weights.mask, batch.tokens.mask, rtol=0, atol=0)
    assert not weights.clipped_c2.any()
    assert float(weights.normalizer.min()) > 0 and float(weights.normalizer.max()) <= 1


def test_a_frozen_actor_stays_as_it_is_while_the_policy_moves(
    make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    job = make_job("actor.train=false")
    trainer = make_trainer(job)
    before = {role: [p.clone() for p in model.parameters()] for role, model in trainer.models.items()}
    row = trainer.train_batch(build_batch(make_groups(job), job.algorithm.advantage), first_step=0)[0]
    moved = {
        role: any(not torch.equal(old, new) for old, new in zip(before[role], model.parameters(), strict=True))
        for role, model in trainer.models.items()
    }
    assert moved == {"policy": True, "actor": False}
    assert "kl/policy_actor" not in row and row["policy/grad_norm"] > 0


def test_a_gradient_that_is_not_finite_changes_no_weight(
    make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    job = make_job()
    trainer = make_trainer(job)
    batch = build_batch(make_groups(job), job.algorithm.advantage)
    advantages = torch.full_like(batch.tokens.advantages, float("nan"))
    before = {role: [p.clone() for p in model.parameters()] for role, model in trainer.models.items()}
    row = trainer.train_batch(replace(batch, tokens=replace(batch.tokens, advantages=advantages)), first_step=0)[0]
    assert math.isnan(row["policy/grad_norm"]) and math.isnan(row["actor/grad_norm"])
    for role, model in trainer.models.items():
        assert all(torch.equal(old, new) for old, new in zip(before[role], model.parameters(), strict=True))
    row = trainer.train_batch(batch, first_step=1)[0]
    assert math.isfinite(row["policy/grad_norm"]) and math.isfinite(row["policy/loss"])


def test_several_updates_per_batch_are_several_steps(
    make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    job = make_job("learner.updates_per_batch=2", "learner.schedule.warmup_steps=1")
    trainer = make_trainer(job)
    rows = trainer.train_batch(build_batch(make_groups(job), job.algorithm.advantage), first_step=2)
    assert [row["step"] for row in rows] == [3, 4]
    assert [row["staleness/max"] for row in rows] == [2, 3]
    assert rows[0]["rollout_corr/obrs_bias_correction"] == rows[1]["rollout_corr/obrs_bias_correction"]
    assert all(row["policy/lr"] == job.learner.lr for row in rows)


def test_the_row_holds_the_figures_of_the_batch(
    make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    job = make_job()
    groups = make_groups(job)
    row = make_trainer(job).train_batch(build_batch(groups, job.algorithm.advantage), first_step=0)[0]
    acceptance = np.concatenate([score.acceptance_probs for group in groups for score in group.scores])
    masks = np.concatenate([score.mask for group in groups for score in group.scores])
    rewards = [trajectory.reward for group in groups for trajectory in group.group.trajectories]
    assert row["rollout_corr/obrs_acceptance_rate"] == pytest.approx(acceptance.mean(dtype=np.float64))
    assert row["rollout_corr/obrs_accepted_fraction"] == pytest.approx(masks.mean())
    # Z = head + τ · tail rounds three times; its mean does not, and is the acceptance's.
    assert row["rollout_corr/obrs_normalizer"] == pytest.approx(acceptance.mean(dtype=np.float64), rel=gamma(3))
    assert row["reward/mean"] == pytest.approx(np.mean(rewards))
    assert row["response/truncated_fraction"] == pytest.approx(1 / 3)
    assert 0 < row["rollout_corr/rollout_is_eff_sample_size"] <= 1
    assert row["kl/policy_actor"] > 0 and row["rollout_corr/nonfinite"] == 0


def test_without_rejection_nothing_is_brought_nearer(
    make_job: MakeJob, make_trainer: MakeTrainer, make_groups: MakeGroups
) -> None:
    rows = {}
    for correction in ("jackpot", "tis"):
        job = make_job(f"algorithm.correction={correction}")
        batch = build_batch(make_groups(job), job.algorithm.advantage)
        rows[correction] = make_trainer(job).train_batch(batch, first_step=0)[0]
    ratio = (batch.tokens.reference_logprobs - batch.tokens.actor_logprobs).double()
    before = float((ratio.exp() * ratio - ratio.exp() + 1).mean())
    for row in rows.values():
        assert row["rollout_corr/kl_before"] == pytest.approx(before)
        median = ratio.exp().sort().values[round(0.5 * (len(ratio) - 1))]
        assert row["rollout_corr/target_ratio_p50"] == pytest.approx(float(median))
        assert row["rollout_corr/target_ratio_p01"] < row["rollout_corr/target_ratio_p99"]
    assert rows["tis"]["rollout_corr/kl_after"] == pytest.approx(before)
    assert rows["tis"]["rollout_corr/obrs_lambda"] == 0
    assert rows["jackpot"]["rollout_corr/kl_after"] != pytest.approx(before)
