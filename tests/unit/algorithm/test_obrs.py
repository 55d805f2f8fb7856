"""Acceptance, masks and weights: values, identities, and reproducibility across processes."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jackpot.algorithm.corrections.jackpot import jackpot_weights
from jackpot.algorithm.obrs import acceptance_mask, acceptance_probs, acceptance_uniforms

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True, database=None)
LOGPROB = st.floats(min_value=-30.0, max_value=0.0)
LAMBDA = st.floats(min_value=1e-3, max_value=1e3)


def logs(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_acceptance_is_the_target_ratio_over_lambda_at_most_one() -> None:
    accepted = acceptance_probs(logs(0.1, 0.4, 0.3), logs(0.4, 0.1, 0.3), obrs_lambda=1.0)
    torch.testing.assert_close(accepted, torch.tensor([0.25, 1.0, 1.0], dtype=torch.float64))
    accepted = acceptance_probs(logs(0.1, 0.4, 0.3), logs(0.4, 0.1, 0.3), obrs_lambda=2.0)
    torch.testing.assert_close(accepted, torch.tensor([0.125, 1.0, 0.5], dtype=torch.float64))


def test_acceptance_survives_ratios_that_overflow() -> None:
    accepted = acceptance_probs(torch.tensor([-1.0, -500.0]), torch.tensor([-500.0, -1.0]), obrs_lambda=1.0)
    assert accepted.tolist() == [1.0, 0.0]


def test_lambda_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"math domain|positive"):
        acceptance_probs(logs(0.5), logs(0.5), obrs_lambda=0.0)


def test_nothing_here_carries_a_gradient() -> None:
    target = logs(0.2, 0.3).requires_grad_()
    normalizer = torch.ones(2, dtype=torch.float64, requires_grad=True)
    weights = jackpot_weights(
        target, logs(0.3, 0.1), normalizer, obrs_lambda=1.0, c1=3.0, reference_logprobs=target, c2=2.0
    )
    assert not acceptance_probs(target, logs(0.3, 0.1), 1.0).requires_grad
    assert not weights.value.requires_grad
    assert not weights.raw.requires_grad


@EXAMPLES
@given(target=LOGPROB, actor=LOGPROB, obrs_lambda=LAMBDA)
def test_acceptance_times_weight_is_the_target_ratio(target: float, actor: float, obrs_lambda: float) -> None:
    """min(1, s/λ) · max(λ, s) = s."""
    t, q = torch.tensor([target], dtype=torch.float64), torch.tensor([actor], dtype=torch.float64)
    weight = jackpot_weights(t, q, torch.ones_like(t), obrs_lambda=obrs_lambda, c1=math.inf).value
    product = acceptance_probs(t, q, obrs_lambda) * weight
    assert product.item() == pytest.approx(math.exp(target - actor), rel=1e-12)


def test_weights_by_hand() -> None:
    target, actor = logs(0.1, 0.4, 0.3), logs(0.4, 0.1, 0.3)
    normalizer = torch.tensor([0.5, 0.9, 0.8], dtype=torch.float64)
    weights = jackpot_weights(target, actor, normalizer, obrs_lambda=0.5, c1=3.0)
    # max(λ, s) = 0.5, 4, 1
    torch.testing.assert_close(weights.raw, torch.tensor([0.25, 3.6, 0.8], dtype=torch.float64))
    torch.testing.assert_close(weights.value, torch.tensor([0.25, 3.0, 0.8], dtype=torch.float64))
    assert weights.clipped.tolist() == [False, True, False]
    assert weights.clipped_c2 is None


def test_second_factor_when_the_target_is_the_policy() -> None:
    target, actor, reference = logs(0.2, 0.4), logs(0.2, 0.2), logs(0.1, 0.36)
    ones = torch.ones(2, dtype=torch.float64)
    weights = jackpot_weights(target, actor, ones, obrs_lambda=1.0, c1=1.5, reference_logprobs=reference, c2=0.8)
    # min(w, 1.5) = 1, 1.5; p_ref/p_t = 0.5, 0.9 of which the second is cut at 0.8
    torch.testing.assert_close(weights.value, torch.tensor([0.5, 1.2], dtype=torch.float64))
    assert weights.clipped.tolist() == [False, True]
    assert weights.clipped_c2 is not None and weights.clipped_c2.tolist() == [False, True]
    unlimited = jackpot_weights(target, actor, ones, obrs_lambda=1.0, c1=math.inf, reference_logprobs=reference)
    torch.testing.assert_close(unlimited.value, torch.tensor([0.5, 1.8], dtype=torch.float64))
    assert unlimited.clipped_c2 is not None and not unlimited.clipped_c2.any()


@EXAMPLES
@given(seed=st.integers(min_value=0, max_value=2**63 - 1), length=st.integers(0, 50), more=st.integers(0, 50))
def test_uniforms_do_not_depend_on_what_follows(seed: int, length: int, more: int) -> None:
    longer = acceptance_uniforms(seed, "job.s3.e0.p7.a0#2", length + more)
    assert torch.equal(acceptance_uniforms(seed, "job.s3.e0.p7.a0#2", length), longer[:length])


def test_uniforms_are_pinned() -> None:
    """A change of these numbers would change the mask of every running job."""
    uniforms = acceptance_uniforms(0, "job.s0.e0.p0.a0#0", 3)
    assert uniforms.dtype == torch.float64
    assert uniforms.tolist() == [0.7197203091523207, 0.9860929259576541, 0.3588765266385412]


def test_uniforms_are_the_same_in_every_job_of_a_seed() -> None:
    first, second = (acceptance_uniforms(3, f"{job}.s5.e0.p7.a1#2", 20) for job in ("demo-1", "demo-2"))
    assert torch.equal(first, second)


def test_uniforms_differ_by_seed_and_by_trajectory() -> None:
    base = acceptance_uniforms(1, "job.s0.e0.p0.a0#1", 100)
    # The last pair reads the same when seed and id are simply put together.
    for seed, name in ((2, "job.s0.e0.p0.a0#1"), (1, "job.s0.e0.p0.a0#2"), (11, "ob.s0.e0.p0.a0#1")):
        other = acceptance_uniforms(seed, name, 100)
        assert (base - other).abs().min() > 0
        assert torch.corrcoef(torch.stack([base, other]))[0, 1].abs() < 0.4  # four standard errors


def test_uniforms_are_uniform() -> None:
    uniforms = acceptance_uniforms(5, "t", 100_000)
    assert uniforms.min() >= 0.0
    assert uniforms.max() < 1.0
    ranks = torch.arange(100_000) / 100_000
    assert (uniforms.sort().values - ranks).abs().max() < 1.95 / math.sqrt(100_000)  # Kolmogorov-Smirnov, p = 0.001


def test_mask_accepts_as_often_as_it_says() -> None:
    probabilities = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]).repeat_interleave(20_000)
    mask = acceptance_mask(probabilities, acceptance_uniforms(0, "t", 100_000))
    assert mask.dtype == torch.bool
    rates = mask.double().view(5, -1).mean(1)
    assert rates[0] == 0
    assert rates[4] == 1
    torch.testing.assert_close(rates[1:4], torch.tensor([0.1, 0.5, 0.9]).double(), rtol=0, atol=0.015)


def test_a_token_of_probability_zero_is_never_accepted() -> None:
    """Uniform numbers include 0 and exclude 1, so that the comparison has to be strict."""
    mask = acceptance_mask(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.0, 0.5, 1 - 2**-24]))
    assert mask.tolist() == [False, False, True]


def test_mask_is_the_same_in_another_process() -> None:
    program = (
        "from jackpot.algorithm.obrs import acceptance_mask, acceptance_uniforms; import torch\n"
        "torch.manual_seed(99)\n"
        "mask = acceptance_mask(torch.linspace(0, 1, 200), acceptance_uniforms(7, 'job.s0.e0.p0.a0#1', 200))\n"
        "print(''.join('01'[bit] for bit in mask.int().tolist()))"
    )
    output = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True).stdout
    mask = acceptance_mask(torch.linspace(0, 1, 200), acceptance_uniforms(7, "job.s0.e0.p0.a0#1", 200))
    assert output.strip() == "".join("01"[bit] for bit in mask.int().tolist())
