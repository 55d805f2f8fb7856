"""The figures against enumeration of a vocabulary, and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from jackpot.algorithm.diagnostics import (
    effective_sample_ratio,
    exact_kl_before_and_after,
    kl_before_and_after,
    ratio_quantiles,
)
from jackpot.algorithm.obrs import acceptance_probs, full_normalizer


def rows(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target, actor = torch.randn(2, 40, generator=generator, dtype=torch.float64).log_softmax(-1)
    return target, actor


@pytest.mark.parametrize("obrs_lambda", [0.3, 1.0, 3.0])
def test_exact_divergences_are_those_of_the_accepted_tokens_distribution(obrs_lambda: float) -> None:
    target, actor = rows(0)
    accepted = actor.exp() * acceptance_probs(target, actor, obrs_lambda)
    accepted = (accepted / accepted.sum()).log()
    before, after = exact_kl_before_and_after(target[None], actor[None], obrs_lambda)
    assert before.item() == pytest.approx(float((target.exp() * (target - actor)).sum()))
    assert after.item() == pytest.approx(float((target.exp() * (target - accepted)).sum()))
    assert 0 <= after.item() <= before.item()
    # No more can be gained than the acceptance that is paid.
    assert before.item() - after.item() <= -math.log(full_normalizer(target[None], actor[None], obrs_lambda).head)


@pytest.mark.parametrize("obrs_lambda", [0.3, 1.0, 3.0])
def test_estimates_are_unbiased_and_never_negative(obrs_lambda: float) -> None:
    """Their means over the actor's distribution, by enumeration, are the exact divergences."""
    target, actor = rows(1)
    z = full_normalizer(target[None], actor[None], obrs_lambda).head
    tokens = [kl_before_and_after(target[x : x + 1], actor[x : x + 1], z, obrs_lambda) for x in range(40)]
    before, after = exact_kl_before_and_after(target[None], actor[None], obrs_lambda)
    weights = actor.exp().tolist()
    assert sum(p * k.before for p, k in zip(weights, tokens, strict=True)) == pytest.approx(before.item())
    assert sum(p * k.after for p, k in zip(weights, tokens, strict=True)) == pytest.approx(after.item())
    assert min(min(k.before, k.after) for k in tokens) >= -1e-12


def test_no_mismatch_is_no_divergence() -> None:
    same = torch.tensor([-1.0, -3.0])
    found = kl_before_and_after(same, same, torch.ones(2), 1.0)
    assert (found.before, found.after) == (0.0, 0.0)
    nothing = kl_before_and_after(same[:0], same[:0], same[:0], 1.0)
    assert (nothing.before, nothing.after) == (0.0, 0.0)


def test_a_normalizer_of_zero_stays_finite() -> None:
    found = kl_before_and_after(torch.tensor([-1.0]), torch.tensor([-2.0]), torch.zeros(1), 1.0)
    assert math.isfinite(found.after)


def test_effective_sample_ratio() -> None:
    assert effective_sample_ratio(torch.full((7,), 0.3)) == pytest.approx(1.0)
    assert effective_sample_ratio(torch.tensor([0.0, 5.0, 0.0, 0.0])) == pytest.approx(0.25)
    assert effective_sample_ratio(torch.tensor([1.0, 3.0])) == pytest.approx(16 / 20)
    assert effective_sample_ratio(torch.zeros(3)) == 0.0


def test_quantiles_of_the_ratio() -> None:
    ratios = torch.tensor([4.0, 1.0, 0.5, 2.0, 8.0])
    found = ratio_quantiles(ratios.log(), torch.zeros(5), [0.0, 0.25, 0.5, 1.0])
    assert found == pytest.approx([0.5, 1.0, 2.0, 8.0])
    assert math.isnan(ratio_quantiles(torch.zeros(0), torch.zeros(0), [0.5])[0])
