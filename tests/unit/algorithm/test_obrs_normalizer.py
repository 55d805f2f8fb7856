"""Estimators of Z against the whole vocabulary, and their calibration over a batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import gamma, rounding, unit_roundoff
from torch import Tensor

from jackpot.algorithm.corrections.jackpot import NormalizerName
from jackpot.algorithm.obrs import (
    Candidates,
    acceptance_probs,
    calibrate_kappa,
    calibrate_tau,
    estimate_normalizer,
    full_normalizer,
    mean_acceptance,
    normalizer_from,
    tail_normalizer,
    union_kappa_normalizer,
    union_tail_normalizer,
)

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True, database=None)
LAMBDAS = st.sampled_from([0.1, 0.5, 1.0, 2.0, 10.0])
VOCABULARY = 50  # at most, of the cases that are not said to have more
# A sum of probabilities, which err by |log p|·u and a few u of their own; weighed by p the former are the entropy.
ROUNDING = rounding(VOCABULARY + round(math.log(VOCABULARY)) + 4, 1.0)
BOTH = 2 * ROUNDING  # of two sums


def models(seed: int, positions: int, vocabulary: int, distance: float = 1.0) -> tuple[Tensor, Tensor]:
    """log p_t and log p_inf, [positions, vocabulary] float32; positions from nearly certain to nearly uniform."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.linspace(0.5, 6.0, positions)[:, None]
    shared = torch.randn(positions, vocabulary, generator=generator) * sharpness
    own = torch.randn(positions, vocabulary, generator=generator) * distance
    return shared.log_softmax(-1), (shared + own).log_softmax(-1)


def candidates(target: Tensor, actor: Tensor, k: int, exact: bool) -> Candidates:
    actor_logprobs, actor_ids = actor.topk(k)
    target_logprobs, target_ids = target.topk(k)
    return Candidates(
        actor_ids=actor_ids,
        actor_logprobs=actor_logprobs,
        target_logprobs_on_actor=target.gather(1, actor_ids),
        target_ids=target_ids,
        target_logprobs=target_logprobs,
        actor_logprobs_on_target=actor.gather(1, target_ids) if exact else None,
    )


@EXAMPLES
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), distance=st.floats(0.0, 4.0), obrs_lambda=LAMBDAS)
@pytest.mark.parametrize("name", ["tail", "union_tail"])
def test_head_and_tail_bracket_the_normalizer(
    name: NormalizerName, seed: int, k: int, distance: float, obrs_lambda: float
) -> None:
    target, actor = models(seed, 8, 40, distance)
    z = full_normalizer(target, actor, obrs_lambda).head
    parts = estimate_normalizer(name, candidates(target, actor, k, exact=True), obrs_lambda)
    assert (parts.head <= z + BOTH).all()
    assert (parts.head + parts.tail >= z - 2 * BOTH).all()
    assert (parts.tail >= 0).all()
    assert (parts.head + parts.tail <= 1 + BOTH).all()


@EXAMPLES
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), obrs_lambda=LAMBDAS)
def test_knowing_the_actor_narrows_the_bracket(seed: int, k: int, obrs_lambda: float) -> None:
    target, actor = models(seed, 8, 40)
    known = candidates(target, actor, k, exact=True)
    tail, union = tail_normalizer(known, obrs_lambda), union_tail_normalizer(known, obrs_lambda)
    assert (union.head >= tail.head - BOTH).all()
    assert (union.tail <= tail.tail + 2 * BOTH / min(1.0, obrs_lambda)).all()  # a tail is a difference of two sums


@EXAMPLES
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), obrs_lambda=LAMBDAS)
def test_the_bound_on_unknown_probabilities_is_one(seed: int, k: int, obrs_lambda: float) -> None:
    target, actor = models(seed, 8, 40)
    exact = union_kappa_normalizer(candidates(target, actor, k, exact=True), obrs_lambda)
    bound = union_kappa_normalizer(candidates(target, actor, k, exact=False), obrs_lambda)
    z = full_normalizer(target, actor, obrs_lambda).head
    assert (exact.head <= z + BOTH).all()
    assert (exact.head <= bound.head + 2 * BOTH).all()
    assert (bound.head <= 1 + BOTH).all()
    assert (bound.tail == 0).all()


@pytest.mark.parametrize("name", ["tail", "union_tail", "union_kappa"])
@pytest.mark.parametrize("obrs_lambda", [0.3, 1.0, 3.0])
def test_every_estimator_is_exact_when_it_sees_the_whole_vocabulary(name: NormalizerName, obrs_lambda: float) -> None:
    target, actor = models(3, 16, 50)
    parts = estimate_normalizer(name, candidates(target, actor, 50, exact=True), obrs_lambda)
    torch.testing.assert_close(parts.head, full_normalizer(target, actor, obrs_lambda).head, rtol=0, atol=BOTH)
    torch.testing.assert_close(parts.tail, torch.zeros(16), rtol=0, atol=BOTH / min(1.0, obrs_lambda))
    torch.testing.assert_close(parts.mass, torch.ones(16), rtol=0, atol=BOTH)


BY_HAND = rounding(10, 1.0)  # what is left of 1 after a few probabilities, each exp(log p)


def by_hand(exact: bool) -> Candidates:
    """Vocabulary 5; p_inf = .5 .3 .1 .06 .04, p_t = .4 .1 .2 .25 .05; S = {0, 1}; the target's own {0, 3}: T = {3}."""

    def log(*values: float) -> Tensor:
        return torch.tensor([values]).log()

    return Candidates(
        actor_ids=torch.tensor([[0, 1]]),
        actor_logprobs=log(0.5, 0.3),
        target_logprobs_on_actor=log(0.4, 0.1),
        target_ids=torch.tensor([[0, 3]]),
        target_logprobs=log(0.4, 0.25),
        actor_logprobs_on_target=log(0.5, 0.06) if exact else None,
    )


def test_tail_by_hand() -> None:
    parts = tail_normalizer(by_hand(exact=False), obrs_lambda=1.0)
    assert parts.head.item() == pytest.approx(0.4 + 0.1)
    # min(1 − .8, min(q_min = .3, .25) + (1 − .75)) = .2
    assert parts.tail.item() == pytest.approx(0.2, abs=BY_HAND)
    assert parts.mass.item() == pytest.approx(0.75)
    parts = tail_normalizer(by_hand(exact=False), obrs_lambda=4.0)
    assert parts.head.item() == pytest.approx(0.1 + 0.025)
    # .0625 + .25 / 4 = .125 is less than what the actor has left
    assert parts.tail.item() == pytest.approx(0.125, abs=BY_HAND)


def test_union_tail_by_hand() -> None:
    parts = union_tail_normalizer(by_hand(exact=True), obrs_lambda=1.0)
    assert parts.head.item() == pytest.approx(0.4 + 0.1 + 0.06)
    assert parts.tail.item() == pytest.approx(0.14, abs=BY_HAND)  # 1 − .86; the target has .25 left
    assert union_tail_normalizer(by_hand(exact=True), 4.0).tail.item() == pytest.approx(0.0625, abs=BY_HAND)


def test_union_kappa_by_hand() -> None:
    assert union_kappa_normalizer(by_hand(exact=True), 1.0).head.item() == pytest.approx(0.56)
    # q_min = .3 would allow .25 on T, but the actor has .2 left.
    assert union_kappa_normalizer(by_hand(exact=False), 1.0).head.item() == pytest.approx(0.7)
    assert union_kappa_normalizer(by_hand(exact=True), 1.0).mass.item() == pytest.approx(0.75)


def test_union_tail_refuses_to_guess() -> None:
    with pytest.raises(ValueError, match="actor's log-probabilities"):
        union_tail_normalizer(by_hand(exact=False), 1.0)
    with pytest.raises(ValueError, match="full_normalizer"):
        estimate_normalizer("full", by_hand(exact=True), 1.0)


def test_a_token_in_both_lists_counts_once_whatever_the_order() -> None:
    target, actor = models(9, 12, 30)
    known = candidates(target, actor, 6, exact=True)
    shuffle = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    assert known.actor_logprobs_on_target is not None
    shuffled = Candidates(
        actor_ids=known.actor_ids[:, shuffle].to(torch.int32),
        actor_logprobs=known.actor_logprobs[:, shuffle],
        target_logprobs_on_actor=known.target_logprobs_on_actor[:, shuffle],
        target_ids=known.target_ids.flip(1).to(torch.int32),
        target_logprobs=known.target_logprobs.flip(1),
        actor_logprobs_on_target=known.actor_logprobs_on_target.flip(1),
    )
    union = [sorted({*a, *t}) for a, t in zip(known.actor_ids.tolist(), known.target_ids.tolist(), strict=True)]
    assert any(len(row) < 12 for row in union)
    expected = torch.stack([torch.minimum(target, actor).exp()[i, row].sum() for i, row in enumerate(union)])
    for case in (known, shuffled):
        torch.testing.assert_close(union_kappa_normalizer(case, 1.0).head, expected, rtol=0, atol=BOTH)


def test_the_actor_as_its_own_target_accepts_everything_despite_half_precision() -> None:
    _, actor = models(1, 20, 1000)
    known = candidates(actor, actor, 20, exact=False)
    rounded = Candidates(
        actor_ids=known.actor_ids,
        actor_logprobs=known.actor_logprobs.half(),
        target_logprobs_on_actor=known.target_logprobs_on_actor,
        target_ids=known.target_ids,
        target_logprobs=known.target_logprobs,
    )
    parts = tail_normalizer(rounded, 1.0)
    z = normalizer_from(parts.head, parts.tail, "tail", acceptance=1.0)
    # log p errs by |log p| times float16's unit roundoff; weighed by p, that is the entropy of what is seen.
    entropy = -(known.actor_logprobs.exp() * known.actor_logprobs).sum(-1).max()
    half = unit_roundoff(torch.float16) * float(entropy)
    # Head and tail err by that, and so does the τ that makes up for the heads of all positions.
    torch.testing.assert_close(z.value, torch.ones(20), rtol=0, atol=3 * half + BOTH)
    assert z.value.max() <= 1 + BOTH


@pytest.mark.parametrize("name", ["tail", "union_tail", "union_kappa"])
def test_rounding_does_not_make_more_than_a_probability(name: NormalizerName) -> None:
    """Log-probabilities rounded to half precision may add up to more than one."""
    rounded_up = torch.tensor([[0.701, 0.302]]).log()
    parts = estimate_normalizer(
        name,
        Candidates(
            actor_ids=torch.tensor([[0, 1]]),
            actor_logprobs=rounded_up,
            target_logprobs_on_actor=rounded_up,
            target_ids=torch.tensor([[0, 1]]),
            target_logprobs=rounded_up,
            actor_logprobs_on_target=rounded_up,
        ),
        1.0,
    )
    assert (parts.head.item(), parts.tail.item(), parts.mass.item()) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize("obrs_lambda", [0.5, 1.0, 2.0])
def test_calibrated_estimators_are_as_good_as_measured(obrs_lambda: float) -> None:
    """Mean absolute error of Z: little for the tail estimators, several times more for κ, which overshoots."""
    target, actor = models(0, 400, 5000)
    z = full_normalizer(target, actor, obrs_lambda).head
    rate = z.double().mean().item()
    most = min(1.0, 1 / obrs_lambda)
    errors = {}
    for name in ("union_kappa", "tail", "union_tail"):
        parts = estimate_normalizer(name, candidates(target, actor, 20, exact=True), obrs_lambda)
        estimate = normalizer_from(parts.head, parts.tail, name, rate)
        errors[name] = (estimate.value - z).abs().mean().item()
        assert estimate.value.double().mean().item() == pytest.approx(rate, rel=gamma(3))  # head + τ · tail
        if name == "union_kappa":
            assert estimate.value.max() > most
        else:
            assert estimate.value.max() <= most + ROUNDING
    assert errors["union_tail"] <= errors["tail"] < 0.05
    assert errors["union_kappa"] > 3 * errors["tail"]


def test_the_sampled_acceptance_estimates_the_mean_normalizer() -> None:
    target, actor = models(2, 20_000, 30)
    sampled = torch.multinomial(actor.exp(), 1, generator=torch.Generator().manual_seed(0))
    acceptance = acceptance_probs(target.gather(1, sampled), actor.gather(1, sampled), 1.0)
    z = full_normalizer(target, actor, 1.0).head.mean().item()
    assert mean_acceptance(acceptance) == pytest.approx(z, abs=4 * acceptance.std().item() / 20_000**0.5)


def test_scalars_by_hand() -> None:
    head, tail = torch.tensor([0.2, 0.4]), torch.tensor([0.2, 0.6])
    assert calibrate_tau(head, tail, 0.5) == pytest.approx(0.5)
    assert calibrate_kappa(head, 0.45) == pytest.approx(1.5)
    z = normalizer_from(head, tail, "tail", 0.5)
    torch.testing.assert_close(z.value, torch.tensor([0.3, 0.7]))
    assert (z.scalar, z.raw_scalar) == (pytest.approx(0.5), pytest.approx(0.5))
    z = normalizer_from(head, torch.zeros(2), "union_kappa", 0.45)
    torch.testing.assert_close(z.value, torch.tensor([0.3, 0.6]))
    z = normalizer_from(head, torch.zeros(2), "full", 0.45)
    assert (z.value.tolist(), z.scalar) == (head.tolist(), 1.0)


@pytest.mark.parametrize(("acceptance", "applied", "raw"), [(0.9, 1.0, 1.5), (0.1, 0.0, -0.5)])
def test_tau_is_a_fraction_and_the_raw_one_is_reported(acceptance: float, applied: float, raw: float) -> None:
    z = normalizer_from(torch.tensor([0.2, 0.4]), torch.tensor([0.2, 0.6]), "union_tail", acceptance)
    assert z.scalar == applied
    assert z.raw_scalar == pytest.approx(raw)


@pytest.mark.parametrize("name", ["tail", "union_tail", "union_kappa", "full"])
def test_degenerate_batches_do_not_divide_by_zero(name: NormalizerName) -> None:
    empty = normalizer_from(torch.zeros(0), torch.zeros(0), name, mean_acceptance(torch.zeros(0)))
    assert empty.value.shape == (0,)
    no_tail = normalizer_from(torch.full((3,), 0.5), torch.zeros(3), name, 0.5)
    torch.testing.assert_close(no_tail.value, torch.full((3,), 0.5))
    disjoint = normalizer_from(torch.zeros(3), torch.zeros(3), name, 0.0)
    assert disjoint.value.tolist() == [0.0, 0.0, 0.0]
    for z in (empty, no_tail, disjoint):
        assert torch.tensor([z.scalar, z.raw_scalar]).isfinite().all()


def test_no_position() -> None:
    nothing = Candidates(
        actor_ids=torch.zeros(0, 3, dtype=torch.int64),
        actor_logprobs=torch.zeros(0, 3),
        target_logprobs_on_actor=torch.zeros(0, 3),
        target_ids=torch.zeros(0, 2, dtype=torch.int64),
        target_logprobs=torch.zeros(0, 2),
    )
    assert tail_normalizer(nothing, 1.0).head.shape == (0,)
    assert union_kappa_normalizer(nothing, 1.0).mass.shape == (0,)
