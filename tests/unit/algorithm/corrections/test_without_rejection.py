"""Corrections without rejection, by hand."""

from __future__ import annotations

import math

import torch

from jackpot.algorithm.corrections.base import MAX_LOG_RATIO
from jackpot.algorithm.corrections.icepop import icepop_weights
from jackpot.algorithm.corrections.is_ import is_weights
from jackpot.algorithm.corrections.mis import mis_weights
from jackpot.algorithm.corrections.none import no_weights
from jackpot.algorithm.corrections.tis import tis_weights


def test_no_correction_is_one() -> None:
    weights = no_weights(torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -1.0]))
    assert weights.value.tolist() == [1.0, 1.0]
    assert weights.raw.tolist() == [1.0, 1.0]
    assert not weights.clipped.any()


def test_tis_truncates_and_reports_both() -> None:
    reference = torch.tensor([0.8, 0.1, 0.4]).log().requires_grad_()
    weights = tis_weights(reference, torch.tensor([0.2, 0.4, 0.2]).log(), cap=2.5)
    torch.testing.assert_close(weights.raw, torch.tensor([4.0, 0.25, 2.0]))
    torch.testing.assert_close(weights.value, torch.tensor([2.5, 0.25, 2.0]))
    assert weights.clipped.tolist() == [True, False, False]
    assert not weights.value.requires_grad


def test_tis_reports_ratios_below_the_floor_as_clipped() -> None:
    """Their weight is e^−20, which is not their ratio, though no cap is near."""
    logs = torch.tensor([-MAX_LOG_RATIO - 1.0, -MAX_LOG_RATIO, 0.0])
    weights = tis_weights(logs, torch.zeros(3), cap=2.0)
    torch.testing.assert_close(weights.value, torch.tensor([-MAX_LOG_RATIO, -MAX_LOG_RATIO, 0.0]).exp())
    assert weights.clipped.tolist() == [True, False, False]
    whole = tis_weights(logs, torch.zeros(3), cap=2.0, sequence_index=torch.tensor([0, 0, 1]))
    assert whole.clipped.tolist() == [True, True, False]


# Two completions, of three tokens and of two; s = 4, 0.25, 2 and 0.5, 8: products 2 and 4.
REFERENCE = torch.tensor([0.8, 0.1, 0.4, 0.1, 0.8]).log()
ACTOR = torch.tensor([0.2, 0.4, 0.2, 0.2, 0.1]).log()
SEQUENCES = torch.tensor([0, 0, 0, 1, 1])


def test_importance_sampling_is_the_ratio_itself() -> None:
    weights = is_weights(REFERENCE, ACTOR)
    torch.testing.assert_close(weights.value, torch.tensor([4.0, 0.25, 2.0, 0.5, 8.0]))
    assert not weights.clipped.any()


def test_at_sequence_level_every_token_has_the_product_of_its_completion() -> None:
    weights = is_weights(REFERENCE, ACTOR, sequence_index=SEQUENCES)
    torch.testing.assert_close(weights.value, torch.tensor([2.0, 2.0, 2.0, 4.0, 4.0]))
    truncated = tis_weights(REFERENCE, ACTOR, cap=3.0, sequence_index=SEQUENCES)
    torch.testing.assert_close(truncated.value, torch.tensor([2.0, 2.0, 2.0, 3.0, 3.0]))
    assert truncated.clipped.tolist() == [False, False, False, True, True]


def test_icepop_masks_both_sides() -> None:
    weights = icepop_weights(REFERENCE, ACTOR, low=0.5, high=5.0)
    torch.testing.assert_close(weights.value, torch.tensor([4.0, 0.0, 2.0, 0.5, 0.0]))
    torch.testing.assert_close(weights.raw, torch.tensor([4.0, 0.25, 2.0, 0.5, 8.0]))
    assert weights.clipped.tolist() == [False, True, False, False, True]


def test_mis_masks_whole_completions() -> None:
    weights = mis_weights(REFERENCE, ACTOR, sequence_index=SEQUENCES, cap=3.0)
    torch.testing.assert_close(weights.value, torch.tensor([2.0, 2.0, 2.0, 0.0, 0.0]))
    assert weights.clipped.tolist() == [False, False, False, True, True]
    below = mis_weights(REFERENCE, ACTOR, sequence_index=SEQUENCES, cap=5.0, low=3.0)
    torch.testing.assert_close(below.value, torch.tensor([0.0, 0.0, 0.0, 4.0, 4.0]))


def test_products_over_long_completions_stay_finite_and_say_that_they_were_cut() -> None:
    reference, actor = torch.full((5000,), -0.5), torch.full((5000,), -1.0)
    sequences = torch.zeros(5000, dtype=torch.int64)
    weights = is_weights(reference, actor, sequence_index=sequences)
    torch.testing.assert_close(weights.value, torch.full((5000,), math.exp(MAX_LOG_RATIO)))
    assert weights.clipped.all()
    assert not mis_weights(reference, actor, sequence_index=sequences, cap=2.0).value.any()


def test_a_ratio_cut_at_the_floor_is_reported_although_the_band_reaches_down_to_it() -> None:
    reference, actor = torch.tensor([-26.0, -1.0]), torch.tensor([-1.0, -1.0])
    sequences = torch.arange(2)
    for weights in (
        icepop_weights(reference, actor, low=0.0, high=5.0),
        mis_weights(reference, actor, sequence_index=sequences, cap=2.0),
        tis_weights(reference, actor, cap=2.0),
        is_weights(reference, actor),
    ):
        assert weights.clipped.tolist() == [True, False]
        torch.testing.assert_close(weights.value, torch.tensor([math.exp(-MAX_LOG_RATIO), 1.0]))


def test_no_token() -> None:
    nothing = torch.zeros(0)
    assert is_weights(nothing, nothing, sequence_index=torch.zeros(0, dtype=torch.int64)).value.shape == (0,)


def test_no_gradient() -> None:
    reference = REFERENCE.clone().requires_grad_()
    for weights in (
        is_weights(reference, ACTOR),
        icepop_weights(reference, ACTOR, low=0.5, high=5.0),
        mis_weights(reference, ACTOR, sequence_index=SEQUENCES, cap=3.0),
    ):
        assert not weights.value.requires_grad
