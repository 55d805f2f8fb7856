"""Losses against a literal float64 transcription of the paper's equations, denominators, and degenerate batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import pytest
import torch
from tolerances import gamma
from torch import Tensor

from jackpot.algorithm.corrections.jackpot import jackpot_weights
from jackpot.algorithm.objective import (
    TokenLoss,
    actor_loss_sum,
    kl_penalty,
    policy_loss_sum,
    token_denominator,
    token_shares,
)

CLIPS = [(0.2, 0.2), (0.2, 0.28), (None, 0.2), (0.2, None), (None, None)]


def make_batch(num_tokens: int = 64, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Log-probabilities that differ enough for every clip to bite, advantages, Z and a mask; [num_tokens] each."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return torch.randn(num_tokens, generator=generator, dtype=torch.float64) * scale

    reference = -normal(1.0).abs() - 0.1
    return {
        "policy": (reference + normal(0.3)).to(dtype),
        "reference": reference.to(dtype),
        "target": (reference + normal(0.5)).to(dtype),
        "actor": (reference + normal(1.0)).to(dtype),
        "advantages": normal(1.0).to(dtype),
        "normalizer": torch.rand(num_tokens, generator=generator, dtype=torch.float64).to(dtype),
        "mask": torch.rand(num_tokens, generator=generator) < 0.6,
    }


def transcribed(
    b: Mapping[str, Tensor], i: int, *, lam: float, c1: float, c2: float, low: float | None, high: float | None
) -> Tensor:
    """Eq. 5 for token i, with p_t another policy than p_ref, word by word."""
    p_new, p_ref = b["policy"][i].exp(), b["reference"][i].exp()
    p_t, p_inf, a = b["target"][i].exp(), b["actor"][i].exp(), b["advantages"][i]
    w_obrs = b["normalizer"][i] * max(lam, (p_t / p_inf).item())
    rho = (min(w_obrs.item(), c1) * min((p_ref / p_t).item(), c2)) if b["mask"][i] else 0.0
    r = p_new / p_ref
    clipped_r = r
    if low is not None and r.item() < 1 - low:
        clipped_r = torch.tensor(1 - low, dtype=torch.float64)
    if high is not None and r.item() > 1 + high:
        clipped_r = torch.tensor(1 + high, dtype=torch.float64)
    unclipped, clipped = r * a, clipped_r * a
    return -rho * (unclipped if unclipped.item() <= clipped.item() else clipped)


@pytest.mark.parametrize(("low", "high"), CLIPS)
def test_policy_loss_and_gradient_are_the_papers(low: float | None, high: float | None) -> None:
    batch = make_batch()
    policy = batch["policy"].requires_grad_()
    weights = jackpot_weights(
        batch["target"],
        batch["actor"],
        batch["normalizer"],
        obrs_lambda=0.8,
        c1=0.9,
        reference_logprobs=batch["reference"],
        c2=1.1,
    )
    assert 0 < weights.clipped.sum() < 64
    assert weights.clipped_c2 is not None and 0 < weights.clipped_c2.sum() < 64
    loss = policy_loss_sum(
        policy, batch["reference"], batch["advantages"], weights.value, batch["mask"], clip_low=low, clip_high=high
    )
    (gradient,) = torch.autograd.grad(loss.loss_sum / token_denominator(batch["mask"], "accepted").double(), policy)
    terms = [transcribed(batch, i, lam=0.8, c1=0.9, c2=1.1, low=low, high=high) for i in range(64)]
    expected = torch.stack(terms).sum() / int(batch["mask"].sum())
    (expected_gradient,) = torch.autograd.grad(expected, policy)
    assert loss.loss_sum.item() / int(batch["mask"].sum()) == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("low", "high"), CLIPS)
def test_float32_agrees_with_float64(low: float | None, high: float | None) -> None:
    gradients = []
    for dtype in (torch.float32, torch.float64):
        batch = make_batch(dtype=dtype)
        policy = batch["policy"].requires_grad_()
        loss = policy_loss_sum(
            policy, batch["reference"], batch["advantages"], batch["normalizer"], batch["mask"],
            clip_low=low, clip_high=high,
        )  # fmt: skip
        gradients.append(torch.autograd.grad(loss.loss_sum, policy)[0].double())
    # A product of five factors, each rounded; the ratio of two log p of magnitude m errs by 4·m·u and 2 u of its own.
    most = max(float(batch[name].detach().abs().max()) for name in ("policy", "reference"))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=gamma(math.ceil(4 * most) + 12), atol=0)


def test_actor_loss_and_gradient_are_the_papers() -> None:
    batch = make_batch()
    actor = batch["policy"].requires_grad_()
    loss = actor_loss_sum(
        actor, batch["reference"], batch["actor"], batch["advantages"], cap=1.2, clip_low=0.2, clip_high=0.3
    )
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(64):
        correction = min((batch["reference"][i] - batch["actor"][i]).exp().item(), 1.2)
        r, a = (actor[i] - batch["reference"][i].detach()).exp(), batch["advantages"][i]
        bounded = r if 0.8 <= r.item() <= 1.3 else torch.tensor(0.8 if r.item() < 0.8 else 1.3, dtype=torch.float64)
        expected = expected - correction * (r * a if (r * a).item() <= (bounded * a).item() else bounded * a)
    assert loss.loss_sum.item() == pytest.approx(expected.item(), rel=1e-12)
    found, wanted = (torch.autograd.grad(value, actor)[0] for value in (loss.loss_sum, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert loss.num_active == 64


def test_only_the_new_policy_gets_a_gradient() -> None:
    batch = make_batch()
    tensors = {name: batch[name].requires_grad_() for name in ("policy", "reference", "advantages", "normalizer")}
    loss = policy_loss_sum(*tensors.values(), batch["mask"], clip_low=0.2, clip_high=0.2)
    loss.loss_sum.backward()
    assert tensors["policy"].grad is not None
    assert all(tensor.grad is None for name, tensor in tensors.items() if name != "policy")


def test_counts_by_hand() -> None:
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0, 1.5])
    loss = policy_loss_sum(
        ratios.log(),
        torch.zeros(6),
        torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0]),
        torch.ones(6),
        torch.tensor([True, True, True, True, True, False]),
        clip_low=0.2,
        clip_high=0.2,
    )
    # min(rA, clip(r)A): 1.2, −1.5, 0.5, −0.8, 1
    assert loss.loss_sum.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8 + 1.0))
    assert counts(loss) == {"active": 5, "low": 1, "high": 1, "nonfinite": 0}


def counts(loss: TokenLoss) -> dict[str, int]:
    return {
        "active": int(loss.num_active),
        "low": int(loss.num_clipped_low),
        "high": int(loss.num_clipped_high),
        "nonfinite": int(loss.num_nonfinite),
    }


def test_the_expected_mask_multiplies_by_the_acceptance() -> None:
    batch = make_batch()
    acceptance = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    arguments = (batch["policy"], batch["reference"], batch["advantages"])
    soft = policy_loss_sum(*arguments, batch["normalizer"], acceptance, clip_low=0.2, clip_high=0.2)
    folded = policy_loss_sum(*arguments, batch["normalizer"] * acceptance, torch.ones(64), clip_low=0.2, clip_high=0.2)
    assert soft.loss_sum.item() == pytest.approx(folded.loss_sum.item(), rel=1e-12)


def test_denominators() -> None:
    mask = torch.tensor([True, False, True, True])
    assert token_denominator(mask, "accepted").item() == 3.0
    assert token_denominator(mask, "all").item() == 4.0
    # Less than one expected token is no reason to count one.
    assert token_denominator(torch.tensor([0.25, 0.5]), "accepted").item() == 0.75
    assert token_denominator(torch.tensor([0.25, 0.5]), "all").item() == 2.0


@pytest.mark.parametrize("denominator", ["accepted", "all"])
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_a_batch_without_an_accepted_token_has_loss_and_gradient_zero(
    denominator: Literal["accepted", "all"], num_tokens: int
) -> None:
    policy = torch.full((num_tokens,), -1.0, requires_grad=True)
    fixed = torch.full((num_tokens,), -2.0)
    mask = torch.zeros(num_tokens, dtype=torch.bool)
    loss = policy_loss_sum(policy, fixed, fixed, fixed, mask, clip_low=0.2, clip_high=0.2)
    mean = loss.loss_sum / token_denominator(mask, denominator)
    mean.backward()
    assert mean.item() == 0.0
    assert policy.grad is not None
    assert (policy.grad == 0).all()


def test_what_a_rejected_token_holds_does_not_matter() -> None:
    """inf · 0 is nan, in the loss as in its gradient."""
    policy = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    loss = policy_loss_sum(
        policy,
        torch.tensor([-1.0, -500.0, math.nan]),
        torch.ones(3),
        torch.tensor([2.0, math.inf, math.nan]),
        torch.tensor([True, False, False]),
        clip_low=None,
        clip_high=None,
    )
    loss.loss_sum.backward()
    assert loss.loss_sum.item() == -2.0
    assert policy.grad is not None
    assert policy.grad.tolist() == [-2.0, 0.0, 0.0]
    assert counts(loss)["nonfinite"] == 0


def test_accepted_tokens_that_are_not_finite_are_counted_and_not_hidden() -> None:
    loss = policy_loss_sum(
        torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -1.0, math.nan]), torch.ones(3),
        torch.tensor([1.0, math.inf, 1.0]), torch.ones(3), clip_low=0.2, clip_high=0.2,
    )  # fmt: skip
    assert counts(loss)["nonfinite"] == 2
    assert not loss.loss_sum.isfinite()


@pytest.mark.parametrize("sizes", [[64], [1] * 64, [50, 3, 11], [0, 64, 0]])
@pytest.mark.parametrize("denominator", ["accepted", "all"])
def test_the_split_into_micro_batches_changes_nothing(
    sizes: list[int], denominator: Literal["accepted", "all"]
) -> None:
    batch = make_batch()
    policy = batch["policy"].requires_grad_()
    share = token_denominator(batch["mask"], denominator)

    def part(tokens: slice) -> Tensor:
        return policy_loss_sum(
            policy[tokens], batch["reference"][tokens], batch["advantages"][tokens], batch["normalizer"][tokens],
            batch["mask"][tokens], clip_low=0.2, clip_high=0.2,
        ).loss_sum / share  # fmt: skip

    (whole,) = torch.autograd.grad(part(slice(0, 64)), policy)
    start = 0
    for size in sizes:
        part(slice(start, start + size)).backward()
        start += size
    assert policy.grad is not None
    assert torch.equal(policy.grad, whole)


# Three completions: two of two tokens accepted, none of one, two of three.
MASK = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
SEQUENCES = torch.tensor([0, 0, 1, 2, 2, 2])


@pytest.mark.parametrize(
    ("normalization", "denominator", "expected"),
    [
        ("token", "accepted", [1 / 4] * 6),
        ("token", "all", [1 / 6] * 6),
        ("sequence", "accepted", [1 / 4, 1 / 4, 0, 1 / 4, 1 / 4, 1 / 4]),
        ("sequence", "all", [1 / 6, 1 / 6, 1 / 3, 1 / 9, 1 / 9, 1 / 9]),
        ("constant", "all", [1 / 30] * 6),
        ("constant", "accepted", [6 / 4 / 30] * 6),
    ],
)
def test_shares_by_hand(
    normalization: Literal["token", "sequence", "constant"],
    denominator: Literal["accepted", "all"],
    expected: list[float],
) -> None:
    shares = token_shares(MASK, SEQUENCES, denominator=denominator, normalization=normalization, constant_length=10)
    torch.testing.assert_close(shares, torch.tensor(expected))


@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
def test_shares_of_a_batch_without_an_accepted_token_are_finite(
    normalization: Literal["token", "sequence", "constant"],
) -> None:
    shares = token_shares(torch.zeros(6), SEQUENCES, denominator="accepted", normalization=normalization)
    assert shares.isfinite().all()


def test_shares_multiply_each_tokens_loss() -> None:
    batch = make_batch()
    shares = torch.linspace(0, 1, len(batch["mask"]), dtype=torch.float64)
    kept = [batch[name] for name in ("policy", "reference", "advantages", "normalizer", "mask")]
    whole = policy_loss_sum(*kept, clip_low=0.2, clip_high=0.2, shares=shares).loss_sum
    by_token = sum(
        float(shares[i] * policy_loss_sum(*(x[i : i + 1] for x in kept), clip_low=0.2, clip_high=0.2).loss_sum)
        for i in range(len(shares))
    )
    assert float(whole) == pytest.approx(by_token)


def test_a_negative_advantage_counts_no_more_than_the_dual_clip() -> None:
    """p_ref = e⁻⁴⁰, e⁻¹⁰⁰ (infinite in float32), and ratios on either side of c; a positive advantage is PPO's own."""
    reference = torch.tensor([-40.0, -100.0, -3.0, -3.0, -40.0, -40.0])
    policy = torch.tensor([-8.0, -0.5, math.log(11) - 3, math.log(9) - 3, -8.0, -8.0], requires_grad=True)
    advantages = torch.tensor([-2.0, -1.0, -1.0, -1.0, 1.0, -1.0])
    mask = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    loss = policy_loss_sum(
        policy, reference, advantages, torch.ones(6), mask, clip_low=0.2, clip_high=0.2, dual_clip=10.0
    )
    assert loss.loss_sum.item() == pytest.approx(2 * 10 + 10 + 10 + 9 - 1.2, rel=gamma(20))
    assert (loss.num_dual_clipped.item(), loss.num_nonfinite.item()) == (3, 0)
    (gradient,) = torch.autograd.grad(loss.loss_sum, policy)
    # log 9 − 3 + 3 rounds thrice by 3 u at most, then the exponential and the products.
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, 0.0, 9.0, 0.0, 0.0]), rtol=gamma(16), atol=0)


def test_a_dual_clip_that_does_not_act_changes_no_bit() -> None:
    batch = make_batch(dtype=torch.float32)
    found = []
    for dual_clip in (None, 1e4):
        policy = batch["policy"].detach().requires_grad_()
        loss = policy_loss_sum(
            policy, batch["reference"], batch["advantages"], batch["normalizer"], batch["mask"],
            clip_low=None, clip_high=None, dual_clip=dual_clip,
        )  # fmt: skip
        assert loss.num_dual_clipped == 0
        found.append((loss.loss_sum, *torch.autograd.grad(loss.loss_sum, policy)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


ESTIMATORS: tuple[Literal["k1", "k2", "k3"], ...] = ("k1", "k2", "k3")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_penalty_and_its_gradient_by_enumeration(estimator: Literal["k1", "k2", "k3"]) -> None:
    """Means over p_new of the estimates and of their gradients, against those of the KL itself."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_()
    initial = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    kl = (policy.exp() * (policy - initial)).sum()
    exact = torch.autograd.grad(kl, logits, retain_graph=True)[0]
    probabilities = policy.detach().exp()
    estimate = kl_penalty(policy, initial, estimator)
    assert not estimate.clipped.any()
    if estimator == "k2":
        torch.testing.assert_close(estimate.value, 0.5 * (policy - initial).square())
    else:
        assert (probabilities * estimate.value).sum().item() == pytest.approx(kl.item(), rel=1e-12)
    assert estimator == "k1" or (estimate.value >= 0).all()
    loss = (probabilities * estimate.value).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], exact)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_penalty_follows_the_kl_that_it_names_and_not_the_other_way_round(
    estimator: Literal["k1", "k2", "k3"],
) -> None:
    """On three tokens, in closed form: ∂KL(p‖p₀)/∂logit_x = p(x)·(log p(x)/p₀(x) − KL), and ∂KL(p₀‖p) = p − p₀."""
    policy = torch.tensor([0.9, 0.09, 0.01], dtype=torch.float64)
    initial = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    log_ratio = (policy / initial).log()
    closed_form = policy * (log_ratio - (policy * log_ratio).sum())
    logits = policy.log().requires_grad_()
    loss = (policy * kl_penalty(logits.log_softmax(0), initial.log(), estimator).value).sum()
    gradient = torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(gradient, closed_form, rtol=1e-12, atol=1e-15)
    assert gradient.tolist() == pytest.approx([0.230, -0.184, -0.045], abs=5e-4)
    assert (policy - initial).tolist() == pytest.approx([0.600, -0.210, -0.390])


@pytest.mark.parametrize(("estimator", "value"), [("k1", -10.0), ("k2", 50.0), ("k3", math.exp(10) - 11)])
def test_one_improbable_token_has_a_bounded_penalty_and_is_counted(
    estimator: Literal["k1", "k2", "k3"], value: float
) -> None:
    policy = torch.tensor([-26.0, -1.0, -11.5], requires_grad=True)
    estimate = kl_penalty(policy, torch.tensor([-1.0, -26.0, -2.0]), estimator)
    assert estimate.clipped.tolist() == [True, True, False]
    assert estimate.value[0].item() == pytest.approx(value, rel=1e-6)
    assert torch.autograd.grad(estimate.value.sum(), policy)[0].tolist() == [-10.0, 10.0, -9.5]
