"""Theorems 3.3 and 3.4 of the paper, on whole distributions, with the package's own acceptance rule."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from jackpot.algorithm.obrs import acceptance_probs, full_normalizer

EXAMPLES = settings(max_examples=80, deadline=None, derandomize=True, database=None)
LOGIT = st.floats(min_value=-8.0, max_value=8.0)
PAIRS = st.lists(st.tuples(LOGIT, LOGIT), min_size=2, max_size=12)
LAMBDA = st.floats(min_value=0.02, max_value=50.0)
ROUNDING = 1e-12


def distributions(pairs: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    """log p_t and log p_inf, [V] each, float64."""
    target, actor = torch.tensor(pairs, dtype=torch.float64).log_softmax(0).unbind(1)
    return target, actor


def kl(target: Tensor, other: Tensor) -> float:
    return float((target.exp() * (target - other)).sum())


def rejected(target: Tensor, actor: Tensor, acceptance: Tensor) -> tuple[Tensor, float]:
    """log of the distribution of accepted tokens, and the acceptance rate."""
    rate = (actor.exp() * acceptance).sum()
    return actor + acceptance.log() - rate.log(), float(rate)


def scaled_to_rate(rule: Tensor, actor: Tensor, rate: float) -> Tensor:
    """min(1, c · rule) with the c that accepts at ``rate``."""
    low, high = 0.0, 1.0
    while float((actor.exp() * (high * rule).clamp(max=1)).sum()) < rate:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if float((actor.exp() * (middle * rule).clamp(max=1)).sum()) < rate:
            low = middle
        else:
            high = middle
    return (high * rule).clamp(max=1)


@EXAMPLES
@given(pairs=PAIRS, obrs_lambda=LAMBDA)
def test_kl_never_grows(pairs: list[tuple[float, float]], obrs_lambda: float) -> None:
    target, actor = distributions(pairs)
    acceptance = acceptance_probs(target, actor, obrs_lambda)
    accepted, rate = rejected(target, actor, acceptance)
    gain = kl(target, actor) - kl(target, accepted)
    assert gain >= -ROUNDING
    # What was gained, exactly; −log Z bounds it.
    assert gain == pytest.approx(-math.log(rate) + float((target.exp() * acceptance.log()).sum()), abs=1e-9)
    assert gain <= -math.log(rate) + ROUNDING


@EXAMPLES
@given(pairs=PAIRS, position=st.floats(min_value=0.05, max_value=0.95))
def test_kl_shrinks_strictly_where_some_tokens_are_rejected(pairs: list[tuple[float, float]], position: float) -> None:
    target, actor = distributions(pairs)
    ratios = target - actor
    spread = float(ratios.max() - ratios.min())
    assume(spread > 0.1)
    obrs_lambda = math.exp(float(ratios.min()) + position * spread)
    accepted, rate = rejected(target, actor, acceptance_probs(target, actor, obrs_lambda))
    assume(rate < 1 - 1e-6)
    assert kl(target, accepted) < kl(target, actor)


@pytest.mark.parametrize("obrs_lambda", [0.1, 0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kl_shrinks_over_a_large_vocabulary(obrs_lambda: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(100_000, generator=generator, dtype=torch.float64) * (1.0 + seed)
    target = logits.log_softmax(0)
    actor = (logits + torch.randn(100_000, generator=generator, dtype=torch.float64)).log_softmax(0)
    accepted, rate = rejected(target, actor, acceptance_probs(target, actor, obrs_lambda))
    assert 0 < rate < 1
    assert kl(target, accepted) < kl(target, actor)
    assert float(accepted.exp().sum()) == pytest.approx(1.0, abs=1e-9)


@EXAMPLES
@given(pairs=PAIRS, smaller=LAMBDA, larger=LAMBDA)
def test_acceptance_falls_and_alignment_grows_with_lambda(
    pairs: list[tuple[float, float]], smaller: float, larger: float
) -> None:
    smaller, larger = sorted((smaller, larger))
    target, actor = distributions(pairs)
    loose, loose_rate = rejected(target, actor, acceptance_probs(target, actor, smaller))
    tight, tight_rate = rejected(target, actor, acceptance_probs(target, actor, larger))
    assert tight_rate <= loose_rate + ROUNDING
    assert kl(target, tight) <= kl(target, loose) + ROUNDING


@EXAMPLES
@given(pairs=PAIRS)
def test_limits_of_lambda(pairs: list[tuple[float, float]]) -> None:
    target, actor = distributions(pairs)
    everything, rate = rejected(target, actor, acceptance_probs(target, actor, float((target - actor).min().exp())))
    assert rate == pytest.approx(1.0, abs=1e-9)
    torch.testing.assert_close(everything, actor)
    highest = float((target - actor).max().exp())
    aligned, rate = rejected(target, actor, acceptance_probs(target, actor, highest))
    assert rate == pytest.approx(1 / highest, rel=1e-9)
    torch.testing.assert_close(aligned, target)


@EXAMPLES
@given(pairs=PAIRS, rate=st.floats(min_value=0.05, max_value=0.99))
def test_every_rate_has_its_lambda(pairs: list[tuple[float, float]], rate: float) -> None:
    target, actor = distributions(pairs)
    low, high = -40.0, 40.0
    for _ in range(100):
        middle = (low + high) / 2
        z = full_normalizer(target[None], actor[None], math.exp(middle)).head.item()
        low, high = (middle, high) if z > rate else (low, middle)
    assert full_normalizer(target[None], actor[None], math.exp(high)).head.item() == pytest.approx(rate, rel=1e-6)


@EXAMPLES
@given(pairs=PAIRS, obrs_lambda=LAMBDA, seed=st.integers(0, 2**31), nearness=st.sampled_from([0.05, 0.5, 3.0]))
def test_no_rule_of_equal_budget_is_better(
    pairs: list[tuple[float, float]], obrs_lambda: float, seed: int, nearness: float
) -> None:
    target, actor = distributions(pairs)
    acceptance = acceptance_probs(target, actor, obrs_lambda)
    best, rate = rejected(target, actor, acceptance)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(4):
        noise = torch.randn(len(pairs), generator=generator, dtype=torch.float64)
        rule = scaled_to_rate(acceptance * (nearness * noise).exp(), actor, rate)
        other, other_rate = rejected(target, actor, rule)
        assert other_rate == pytest.approx(rate, rel=1e-9)
        assert kl(target, other) >= kl(target, best) - 1e-9


@EXAMPLES
@given(pairs=PAIRS, obrs_lambda=LAMBDA)
def test_normalizer_is_the_expected_acceptance(pairs: list[tuple[float, float]], obrs_lambda: float) -> None:
    target, actor = distributions(pairs)
    expected = float((actor.exp() * acceptance_probs(target, actor, obrs_lambda)).sum())
    parts = full_normalizer(target[None], actor[None], obrs_lambda)
    assert parts.head.item() == pytest.approx(expected, rel=1e-12)
    assert parts.tail.item() == 0.0
    assert parts.mass.item() == 1.0
