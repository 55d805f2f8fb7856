"""Our corrections against verl's, on the same arrays. `pip install verl` to run them; verl is no dependency."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jackpot.algorithm.correction import Weights, icepop_weights, is_weights, mis_weights, tis_weights

LENGTHS = (1, 3, 7, 12)


@pytest.fixture(scope="module")
def verl() -> Any:
    # verl and what it imports warn about much that is not ours.
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "verl.trainer.ppo.rollout_corr_helper",
            reason="verl, the library that this compares with, is not installed",
            exc_type=ImportError,
        )


@pytest.fixture(scope="module")
def arrays() -> tuple[Tensor, Tensor, Tensor]:
    """log p_ref and log p_inf, [tokens], and the completion of each token."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(LENGTHS)
    reference = -torch.rand(num_tokens, generator=generator) * 3
    actor = reference - torch.randn(num_tokens, generator=generator) * 0.7
    return reference, actor, torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))


def padded(values: Tensor) -> Tensor:
    rows = torch.split(values, list(LENGTHS))
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def theirs(verl: Any, arrays: tuple[Tensor, Tensor, Tensor], level: str, threshold: float | str) -> Tensor:
    """verl's weights of our tokens, flat as ours are."""
    reference, actor, _ = arrays
    mask = padded(torch.ones_like(reference))
    weights, _ = verl.compute_rollout_correction_weights(
        padded(reference - actor), mask, rollout_is=level, rollout_is_threshold=threshold
    )
    flat: Tensor = weights[mask.bool()]
    return flat


def agree(ours: Weights, expected: Tensor) -> None:
    torch.testing.assert_close(ours.value, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("cap", [0.7, 2.0])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_tis(verl: Any, arrays: tuple[Tensor, Tensor, Tensor], level: str, cap: float) -> None:
    reference, actor, sequences = arrays
    ours = tis_weights(reference, actor, cap=cap, sequence_index=sequences if level == "sequence" else None)
    assert 0 < int(ours.clipped.sum()) < len(reference)
    agree(ours, theirs(verl, arrays, level, cap))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_is(verl: Any, arrays: tuple[Tensor, Tensor, Tensor], level: str) -> None:
    reference, actor, sequences = arrays
    ours = is_weights(reference, actor, sequence_index=sequences if level == "sequence" else None)
    agree(ours, theirs(verl, arrays, level, 1e9))


@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (0.8, 5.0)])
def test_icepop(verl: Any, arrays: tuple[Tensor, Tensor, Tensor], low: float, high: float) -> None:
    reference, actor, _ = arrays
    ours = icepop_weights(reference, actor, low=low, high=high)
    assert 0 < int(ours.clipped.sum()) < len(reference)
    agree(ours, theirs(verl, arrays, "token", f"{low}_{high}"))


@pytest.mark.parametrize(("low", "cap"), [(1e-9, 2.0), (0.5, 3.0)])
def test_mis(verl: Any, arrays: tuple[Tensor, Tensor, Tensor], low: float, cap: float) -> None:
    reference, actor, sequences = arrays
    ours = mis_weights(reference, actor, sequence_index=sequences, cap=cap, low=low)
    assert 0 < int(ours.clipped.sum()) < len(reference)
    agree(ours, theirs(verl, arrays, "sequence", f"{low}_{cap}"))
