"""Means with 95 % intervals, paired differences, shares. numpy only; each against its closed form in the tests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 10_000
EXACT_SIGNS = 16  # up to this many pairs all 2^n sign patterns are enumerated
Floats = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 95 % interval; the interval is None for fewer than two values."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half_width(self) -> float | None:
        """Half the interval's length."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def mean_estimate(values: Floats, interval: Literal["t", "bootstrap"] = "t") -> Estimate:
    """The mean of independent values.

    Args:
        values: at least one.
        interval: ``t``: Student's, exact for normal values. ``bootstrap``: percentiles of 10 000 resampled means,
            the same for the same values.
    """
    array = np.asarray(values, dtype=np.float64)
    mean, count = float(array.mean()), len(array)
    if count < 2:
        return Estimate(mean, None, None, count)
    if interval == "t":
        half = t_quantile(count - 1) * float(array.std(ddof=1)) / math.sqrt(count)
        return Estimate(mean, mean - half, mean + half, count)
    generator = np.random.default_rng(0)
    means = array[generator.integers(0, count, size=(RESAMPLES, count))].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(mean, float(low), float(high), count)


def sign_flip_p(differences: Floats) -> float:
    """Two-sided p of paired differences under the hypothesis that each sign is a coin's (Fisher's permutation test).

    Exact for up to 16 pairs, beyond that from 10 000 random sign patterns, always the same ones.
    """
    array = np.asarray(differences, dtype=np.float64)
    if len(array) <= EXACT_SIGNS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(array))))
        extra = 0
    else:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(RESAMPLES, len(array)))
        extra = 1  # the observed pattern counts among the random ones
    sums = np.abs(signs @ array)
    as_large = int((sums >= abs(array.sum()) - 1e-12).sum())
    return min(1.0, (as_large + extra) / (len(signs) + extra))


def share_estimate(hits: int, count: int) -> Estimate:
    """A share with Wilson's interval, which stays within [0, 1] and is sensible for shares of 0 and 1."""
    z = 1.959963984540054
    share, denominator = hits / count, 1 + z * z / count
    centre = (share + z * z / (2 * count)) / denominator
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / denominator
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), count)


def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """The t for which Student's distribution with these degrees of freedom lies within ±t with this probability."""
    low, high = 0.0, 1.0
    while _within(high, degrees) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """P(|T| < t) of Student's distribution; finite sums (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    if degrees % 2:
        term, total = cosine, 0.0
        for k in range(1, (degrees - 1) // 2 + 1):
            total += term
            term *= cosine * cosine * 2 * k / (2 * k + 1)
        return 2 / math.pi * (angle + sine * total)
    term, total = 1.0, 0.0
    for k in range(1, degrees // 2 + 1):
        total += term
        term *= cosine * cosine * (2 * k - 1) / (2 * k)
    return sine * total
