"""Every outcome of a tiny vocabulary, weighed by its probability: what the loss estimates, without sampling noise."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from jackpot.algorithm.corrections import SampledTokens
from jackpot.algorithm.corrections.jackpot import JackpotCorrection, NormalizerName, jackpot_weights
from jackpot.algorithm.objective import policy_loss_sum, token_denominator, token_shares
from jackpot.algorithm.obrs import acceptance_probs, full_normalizer

ACTOR = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
REFERENCE = torch.tensor([0.1, 0.3, 0.25, 0.35], dtype=torch.float64).log()
TARGET = torch.tensor([0.2, 0.2, 0.2, 0.4], dtype=torch.float64).log()
ADVANTAGES = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)
LOGITS = torch.tensor([0.2, -0.3, 0.1, 0.5], dtype=torch.float64)
LAMBDAS = [0.2, 1.0, 2.5, 8.0]


def policy_gradient(under: Tensor) -> Tensor:
    """Σ_x p(x) · ∇ −(p_new/p_ref) A over the policy's logits, p being ``under``; no clipping. [V]"""
    logits = LOGITS.clone().requires_grad_()
    ratio = (logits.log_softmax(0) - REFERENCE).exp()
    return torch.autograd.grad(-(under.exp() * ratio * ADVANTAGES).sum(), logits)[0]


def estimate(
    tokens: tuple[int, ...], mask: Tensor, obrs_lambda: float, target: Tensor, denominator: Literal["accepted", "all"]
) -> Tensor:
    """The gradient that a batch of sampled tokens with this mask gives, by the package's functions. [V]"""
    index = torch.tensor(tokens)
    normalizer = full_normalizer(target[None], ACTOR[None], obrs_lambda).head.expand(len(tokens))
    weights = jackpot_weights(
        target[index],
        ACTOR[index],
        normalizer,
        obrs_lambda=obrs_lambda,
        c1=math.inf,
        reference_logprobs=None if target is REFERENCE else REFERENCE[index],
    )
    logits = LOGITS.clone().requires_grad_()
    loss = policy_loss_sum(
        logits.log_softmax(0)[index],
        REFERENCE[index],
        ADVANTAGES[index],
        weights.value,
        mask,
        clip_low=None,
        clip_high=None,
    )
    return torch.autograd.grad(loss.loss_sum / token_denominator(mask, denominator).double(), logits)[0]


def enumerated(
    obrs_lambda: float, target: Tensor, denominator: Literal["accepted", "all"], size: int
) -> tuple[Tensor, float]:
    """E[gradient] over all batches of ``size`` tokens and all masks, and P(some token is accepted)."""
    total, some = torch.zeros(4, dtype=torch.float64), 0.0
    acceptance = acceptance_probs(target, ACTOR, obrs_lambda)
    for tokens in itertools.product(range(4), repeat=size):
        for draws in itertools.product((False, True), repeat=size):
            probability = 1.0
            for token, accepted in zip(tokens, draws, strict=True):
                rate = float(acceptance[token])
                probability *= float(ACTOR[token].exp()) * (rate if accepted else 1 - rate)
            if probability > 0:
                total += probability * estimate(tokens, torch.tensor(draws), obrs_lambda, target, denominator)
                some += probability * any(draws)
    return total, some


@pytest.mark.parametrize("obrs_lambda", LAMBDAS)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("target", [REFERENCE, TARGET], ids=["reference", "policy"])
def test_accepted_tokens_estimate_the_expectation_under_the_reference(
    target: Tensor, size: int, obrs_lambda: float
) -> None:
    """Given that a token is accepted at all; eq. 5, with both clips off."""
    gradient, some = enumerated(obrs_lambda, target, "accepted", size)
    torch.testing.assert_close(gradient / some, policy_gradient(REFERENCE), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("obrs_lambda", LAMBDAS)
def test_all_tokens_estimate_it_shrunk_by_the_normalizer(obrs_lambda: float) -> None:
    gradient, _ = enumerated(obrs_lambda, REFERENCE, "all", 2)
    z = full_normalizer(REFERENCE[None], ACTOR[None], obrs_lambda).head.item()
    torch.testing.assert_close(gradient, z * policy_gradient(REFERENCE), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("obrs_lambda", LAMBDAS)
def test_the_expected_mask_has_the_same_mean(obrs_lambda: float) -> None:
    acceptance = acceptance_probs(REFERENCE, ACTOR, obrs_lambda)
    gradient = torch.zeros(4, dtype=torch.float64)
    for tokens in itertools.product(range(4), repeat=2):
        probability = float(ACTOR[list(tokens)].sum().exp())
        gradient += probability * estimate(tokens, acceptance[list(tokens)], obrs_lambda, REFERENCE, "all")
    drawn, _ = enumerated(obrs_lambda, REFERENCE, "all", 2)
    torch.testing.assert_close(gradient, drawn, rtol=1e-9, atol=1e-12)


def test_without_correction_the_expectation_is_the_actors() -> None:
    """The test above can tell: uncorrected tokens estimate something else."""
    assert (policy_gradient(ACTOR) - policy_gradient(REFERENCE)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("normalizer", "denominator", "expected"),
    [("full", "accepted", 0.9 / 1.1), ("full", "all", 0.45), ("none", "all", 0.0), ("none", "accepted", 0.0)],
)
def test_positions_count_in_proportion_to_their_normalizer_unless_it_is_left_out(
    normalizer: NormalizerName, denominator: Literal["accepted", "all"], expected: float
) -> None:
    """Two kinds of positions, Z = 1 with f = +1 and Z = 0.1 with f = −1: the target's mean of f is 0.

    Twenty tokens of each kind, each token as often as the actor samples it, with the mask's expectation in place of
    draws: the batch is the expectation.
    """
    like, unlike = torch.tensor([0.95, 0.05]), torch.tensor([0.05, 0.95])  # Σ min = 1 and 0.1
    tokens = torch.tensor([0] * 19 + [1])
    actor, target = like[tokens].repeat(2), torch.cat([like[tokens], unlike[tokens]])
    f = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(20)
    correction = JackpotCorrection(normalizer=normalizer, mask="expected", c1=1e9)
    mask = acceptance_probs(target.log(), actor.log(), 1.0).double()
    sampled = SampledTokens(
        target_logprobs=target.log().double(),
        actor_logprobs=actor.log().double(),
        sequence_index=torch.zeros(40, dtype=torch.int64),
        normalizer=torch.tensor([1.0, 0.1], dtype=torch.float64).repeat_interleave(20),
        obrs_lambda=torch.ones(40, dtype=torch.float64),
    )
    shares = token_shares(mask, sampled.sequence_index, denominator=denominator).double()
    mean = float((shares * mask * correction.weights(sampled).value * f).sum())
    assert mean == pytest.approx(expected, abs=1e-6)  # 40 terms of at most 1/2, rounded to float32
