"""Our corrections, advantages and losses against verl's, on the same arrays. Needs `pip install verl`, else skipped."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from tolerances import gamma, rounding
from torch import Tensor

from jackpot.algorithm.advantages import ADVANTAGES
from jackpot.algorithm.corrections import Weights
from jackpot.algorithm.corrections.icepop import icepop_weights
from jackpot.algorithm.corrections.is_ import is_weights
from jackpot.algorithm.corrections.mis import mis_weights
from jackpot.algorithm.corrections.tis import tis_weights
from jackpot.algorithm.objective import kl_penalty, token_shares

LENGTHS = (1, 3, 7, 12)
# Both round: a sum of up to 12 differences of log p that add up to less than 36 in magnitude, and its exponential.
RATIO = 2 * gamma(12 + 36)


def peer(module: str) -> Any:
    # verl and what it imports warn about much that is not ours.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            module, reason="verl, the library that this compares with, is not installed", exc_type=ImportError
        )


@pytest.fixture(scope="module")
def verl() -> Any:
    return peer("verl.trainer.ppo.rollout_corr_helper")


@pytest.fixture(scope="module")
def algorithms() -> Any:
    return peer("verl.trainer.ppo.core_algos")


@pytest.fixture(scope="module")
def arrays() -> tuple[Tensor, Tensor, Tensor]:
    """log p_ref and log p_inf, [tokens], and the completion of each token."""
    generator = torch.Generator().manual_seed(9)  # products of s below 0.6, near 1.6 and above 7
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
    torch.testing.assert_close(ours.value, expected, rtol=RATIO, atol=0)


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


PEERS: list[tuple[str, str, dict[str, Any]]] = [
    ("grpo", "compute_grpo_outcome_advantage", {}),
    ("dr_grpo", "compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": False}),
    ("rloo", "compute_rloo_outcome_advantage", {}),
    ("reinforce_plus_plus_baseline", "compute_reinforce_plus_plus_baseline_outcome_advantage", {}),
    ("reinforce_plus_plus", "compute_reinforce_plus_plus_outcome_advantage", {"config": SimpleNamespace(gamma=1.0)}),
]


@pytest.mark.parametrize(("name", "theirs_name", "settings"), PEERS, ids=[name for name, *_ in PEERS])
def test_advantages(algorithms: Any, name: str, theirs_name: str, settings: dict[str, Any]) -> None:
    lengths, groups = torch.tensor(LENGTHS), torch.tensor([0, 0, 1, 1])
    rewards = torch.tensor([1.0, 0.0, 0.3, 0.9])
    mask = padded(torch.ones(sum(LENGTHS)))
    token_rewards = torch.zeros_like(mask)
    token_rewards[torch.arange(4), lengths - 1] = rewards
    if name != "reinforce_plus_plus":
        settings = settings | {"index": groups.numpy()}
    expected, _ = getattr(algorithms, theirs_name)(token_level_rewards=token_rewards, response_mask=mask, **settings)
    ours = ADVANTAGES[name]().estimate(rewards, groups, lengths)
    # Their ε of the standard deviation is 1e-6, and not ours; the deviations are above 0.1, the advantages below 3.
    torch.testing.assert_close(ours, expected[:, 0], rtol=1e-6 / 0.1 + 2 * gamma(32), atol=rounding(32, 3.0))


@pytest.mark.parametrize(
    ("normalization", "mode"),
    [
        ("token", "token-mean"),
        ("sequence", "seq-mean-token-mean"),
        ("constant", "seq-mean-token-sum-norm"),
    ],
)
def test_loss_normalization(
    algorithms: Any, normalization: Literal["token", "sequence", "constant"], mode: str
) -> None:
    generator = torch.Generator().manual_seed(2)
    losses = torch.randn(sum(LENGTHS), generator=generator)
    mask = (torch.rand(sum(LENGTHS), generator=generator) < 0.7).float()
    mask[0] = 0.0  # the completion of one token: masked as a whole
    sequences = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    if normalization == "constant":
        mask = torch.ones_like(mask)  # ours rescales by the accepted fraction, which theirs does not know
    expected = algorithms.agg_loss(padded(losses), padded(mask), mode, loss_scale_factor=10)
    shares = token_shares(mask, sequences, denominator="accepted", normalization=normalization, constant_length=10)
    torch.testing.assert_close((losses * mask * shares).sum(), expected)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_penalty(
    algorithms: Any, arrays: tuple[Tensor, Tensor, Tensor], estimator: Literal["k1", "k2", "k3"]
) -> None:
    policy, initial, _ = arrays
    expected = algorithms.kl_penalty_forward(policy, initial, estimator)
    torch.testing.assert_close(
        kl_penalty(policy, initial, estimator).value, expected, rtol=RATIO, atol=rounding(8, 10.0)
    )
