"""Corrections without rejection, by hand."""

from __future__ import annotations

import torch

from jackpot.algorithm.correction import no_weights, tis_weights


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
