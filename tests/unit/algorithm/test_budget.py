"""λ for an acceptance rate: bisection, its bounds, and the estimate behind it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jackpot.algorithm.budget import acceptance_at, smoothed_lambda, solve_lambda
from jackpot.algorithm.obrs import full_normalizer

BOUNDS = {"lower": 1e-3, "upper": 1e3}


def random_ratios(seed: int, num_tokens: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    actor = -torch.rand(num_tokens, generator=generator) * 4
    return actor + spread * torch.randn(num_tokens, generator=generator), actor


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), rate=st.floats(0.1, 0.99), spread=st.floats(0.05, 2.0))
def test_the_found_lambda_gives_the_rate(seed: int, rate: float, spread: float) -> None:
    target, actor = random_ratios(seed, 200, spread)
    found = solve_lambda(target, actor, rate, **BOUNDS)
    greatest = float((target - actor).double().max().exp())
    if acceptance_at(target, actor, greatest) >= rate:  # all is aligned before the rate is used up
        assert found == pytest.approx(greatest, rel=1e-12)
    else:
        assert acceptance_at(target, actor, found) == pytest.approx(rate, abs=1e-9)


def test_by_hand() -> None:
    # s = 1 and 1/4: mean(min(1, s/λ)) is (1 + 1/(4λ))/2 for 1/4 ≤ λ ≤ 1, which is 3/4 at λ = 1/2.
    target, actor = torch.tensor([0.5, 0.1]).log(), torch.tensor([0.5, 0.4]).log()
    assert solve_lambda(target, actor, 0.75, **BOUNDS) == pytest.approx(0.5, rel=1e-6)
    assert solve_lambda(target, actor, 1.0, **BOUNDS) == pytest.approx(0.25, rel=1e-6)


def test_bounds() -> None:
    target, actor = torch.tensor([0.5, 0.1]).log(), torch.tensor([0.5, 0.4]).log()
    assert solve_lambda(target, actor, 1e-9, **BOUNDS) == 1.0  # max s
    assert solve_lambda(target, actor, 1e-9, lower=1e-3, upper=0.5) == 0.5
    assert solve_lambda(target, actor, 1e-9, lower=2.0, upper=10.0) == 2.0
    assert solve_lambda(target, actor, 0.99, lower=0.6, upper=10.0) == 0.6
    assert solve_lambda(torch.zeros(0), torch.zeros(0), 0.9, **BOUNDS) == 1e3
    assert acceptance_at(torch.zeros(0), torch.zeros(0), 1.0) == 1.0


def test_where_nothing_differs_nothing_is_rejected() -> None:
    agreed = torch.tensor([-0.3, -2.0, -7.0])
    found = solve_lambda(agreed, agreed, 0.9, **BOUNDS)
    assert found == 1.0 == acceptance_at(agreed, agreed, found)


def test_tokens_without_a_finite_score_do_not_count() -> None:
    target, actor = torch.tensor([0.5, 0.1]).log(), torch.tensor([0.5, 0.4]).log()
    broken = torch.tensor([math.nan, math.inf])
    with_broken = solve_lambda(torch.cat([target, broken]), torch.cat([actor, torch.zeros(2)]), 0.75, **BOUNDS)
    assert with_broken == solve_lambda(target, actor, 0.75, **BOUNDS)


@pytest.mark.parametrize("obrs_lambda", [0.3, 1.0, 4.0])
def test_the_estimate_is_unbiased(obrs_lambda: float) -> None:
    """Its mean over the actor's distribution is the acceptance rate Z, by enumeration of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    target, actor = torch.randn(2, 30, generator=generator, dtype=torch.float64).log_softmax(-1)
    mean = sum(
        float(actor[x].exp()) * acceptance_at(target[x : x + 1], actor[x : x + 1], obrs_lambda) for x in range(30)
    )
    assert mean == pytest.approx(full_normalizer(target[None], actor[None], obrs_lambda).head.item(), rel=1e-12)


def test_smoothing_is_geometric() -> None:
    assert smoothed_lambda(1.0, 4.0, 0.5) == pytest.approx(2.0)
    assert smoothed_lambda(1.0, 4.0, 0.0) == pytest.approx(4.0)
