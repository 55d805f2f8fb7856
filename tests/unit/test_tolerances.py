"""The bound of rounding errors against sums whose errors are known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tolerances import figures_rounding, gamma, logprob_rounding, model_rounding, rounding, unit_roundoff
from transformers import LlamaConfig

from jackpot.algorithm.output_head import OutputHead


def test_short_sums_have_the_worst_case_and_long_ones_the_likely_one() -> None:
    u = 2.0**-24
    assert unit_roundoff() == u and unit_roundoff(torch.bfloat16) == 2.0**-8
    assert gamma(1) == pytest.approx(u, rel=1e-6) and gamma(10) == pytest.approx(10 * u, rel=1e-5)
    assert gamma(10_000) == pytest.approx(6 * 100 * u, rel=1e-4)


@pytest.mark.parametrize("terms", [8, 60_000])
def test_sums_in_any_order_stay_within_the_bound(terms: int) -> None:
    """One after the other, which errs the most; and the bound is not so wide that it holds whatever happens."""
    products = torch.randn(terms, generator=torch.Generator().manual_seed(0))
    exact, magnitude = math.fsum(products.tolist()), float(products.double().abs().sum())
    worst = 0.0
    for order in (products, products.flip(0), products.sort().values):
        total = np.cumsum(order.numpy(), dtype=np.float32)[-1]  # torch's own adds in float64
        worst = max(worst, abs(float(total) - exact))
    assert 0 < worst <= rounding(terms, magnitude)
    assert rounding(terms, magnitude) < 1e-4 * magnitude
    assert rounding(terms, products) == gamma(terms) * float(products.abs().max())


def test_counts_without_a_bound_are_refused() -> None:
    for terms in (0, 2**8):
        with pytest.raises(ValueError, match=f"terms = {terms}: no bound holds. Give 1 to 255 for torch.bfloat16"):
            gamma(terms, torch.bfloat16)


def test_a_models_sums_are_counted_layer_by_layer_and_twice_for_gradients() -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    terms = 2 * (5 * 32 + 8 + 30 + 64)
    assert model_rounding(config, 30, 4.0) == 2 * 4.0 * gamma(terms)
    assert model_rounding(config, 30, 4.0, backward=True) == 2 * 4.0 * gamma(2 * terms)


def test_an_output_layers_sums_are_its_products_and_its_row() -> None:
    hidden, weight, bias = (
        torch.tensor([[1.0, -2.0]]),
        torch.tensor([[3.0, 1.0], [0.0, -4.0]]),
        torch.tensor([0.0, 1.0]),
    )
    # Magnitudes of the logits: 5, and 8 with 1 of the bias, over the temperature.
    assert logprob_rounding(hidden, OutputHead(weight), 0.5) == pytest.approx(16 * gamma(6) + gamma(2))
    assert logprob_rounding(hidden, OutputHead(weight, bias), 1.0) == pytest.approx(9 * gamma(6) + gamma(2))


def test_figures_that_cancel_err_by_what_they_cancel() -> None:
    assert figures_rounding({"policy/loss": 5.0}, 1e-4) == pytest.approx({"rel": 12e-4, "abs": 4e-4})
    s = torch.tensor([0.5, 4.0], dtype=torch.float64)
    row = {
        "rollout_corr/kl": -s.log().mean().item(),
        "rollout_corr/k3_kl": (s - 1 - s.log()).mean().item(),
        "rollout_corr/kl_before": (s * s.log() - s + 1).mean().item(),
    }
    most = (s * s.log()).mean().item() + 2 / math.e
    assert most >= (s * s.log()).abs().mean()
    assert figures_rounding(row, 1e-4)["abs"] == pytest.approx(4e-4 * most)
