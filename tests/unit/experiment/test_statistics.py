"""Aggregation against closed forms and textbook values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from jackpot.experiment.statistics import mean_estimate, share_estimate, sign_flip_p, t_quantile


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (15, 2.1314), (60, 2.0003)],
)
def test_students_quantiles(degrees: int, quantile: float) -> None:
    assert t_quantile(degrees) == pytest.approx(quantile, abs=5e-5)


def test_quantiles_of_one_and_two_degrees_have_closed_forms() -> None:
    assert t_quantile(1, 0.9) == pytest.approx(math.tan(math.pi * 0.45))
    assert t_quantile(2, 0.9) == pytest.approx(0.9 * math.sqrt(2 / (1 - 0.9**2)))


def test_mean_and_t_interval() -> None:
    estimate = mean_estimate([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert (estimate.mean, estimate.count) == (2.5, 4)
    assert estimate.half_width == pytest.approx(half, rel=1e-6)
    assert (estimate.low, estimate.high) == pytest.approx((2.5 - half, 2.5 + half), rel=1e-6)


def test_one_value_has_no_interval() -> None:
    estimate = mean_estimate([0.5])
    assert (estimate.mean, estimate.low, estimate.high, estimate.half_width) == (0.5, None, None, None)


def test_the_t_interval_covers_the_truth_95_times_of_100() -> None:
    generator = np.random.default_rng(1)
    estimates = [mean_estimate(generator.normal(3.0, 2.0, size=6)) for _ in range(4000)]
    covered = np.mean([e.low is not None and e.high is not None and e.low <= 3.0 <= e.high for e in estimates])
    assert covered == pytest.approx(0.95, abs=0.012)


def test_the_bootstrap_is_near_the_normal_interval_and_repeats_itself() -> None:
    values = np.random.default_rng(2).normal(size=200)
    estimate = mean_estimate(values, "bootstrap")
    assert estimate == mean_estimate(values, "bootstrap")
    assert estimate.half_width == pytest.approx(1.96 * values.std() / math.sqrt(200), rel=0.05)


def test_sign_flips_are_counted_exactly() -> None:
    assert sign_flip_p([1.0, 2.0, 3.0, 4.0, 5.0]) == 2 / 32
    assert sign_flip_p([1.0, -1.0]) == 1.0
    differences = [0.3, -0.1, 0.25, 0.4, -0.05, 0.1]
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=6)
    ]
    expected = sum(total >= abs(sum(differences)) - 1e-12 for total in sums) / 64
    assert sign_flip_p(differences) == expected


def test_many_pairs_are_sampled_and_never_give_zero() -> None:
    assert sign_flip_p([1.0] * 40) == pytest.approx(1 / 10_001)
    assert sign_flip_p(list(np.random.default_rng(3).normal(size=40))) > 0.05


def test_wilsons_interval() -> None:
    none = share_estimate(0, 16)
    assert (none.mean, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(3.8414588 / (16 + 3.8414588))
    half = share_estimate(8, 16)
    assert (half.low, half.high) == pytest.approx((0.28, 0.72), abs=0.005)
