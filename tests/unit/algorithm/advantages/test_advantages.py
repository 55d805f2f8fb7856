"""Advantages by hand, and where rewards do not differ."""

from __future__ import annotations

import pytest
import torch
from tolerances import gamma, rounding

from jackpot.algorithm.advantages import ADVANTAGES
from jackpot.algorithm.advantages.grpo import group_advantages
from jackpot.algorithm.advantages.reinforce_plus_plus import whitened
from jackpot.algorithm.advantages.rloo import leave_one_out_advantages


def test_normalized_by_the_sample_standard_deviation() -> None:
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 4.0, 6.0, 8.0]]), eps=0.0)
    std = (20 / 3) ** 0.5
    expected = torch.tensor([[0.5, -0.5, -0.5, 0.5], [-3.0, -1.0, 1.0, 3.0]])
    torch.testing.assert_close(advantages, expected / torch.tensor([[(1 / 3) ** 0.5], [std]]))
    torch.testing.assert_close(advantages.mean(1), torch.zeros(2), rtol=0, atol=rounding(8, advantages))


def test_differences_alone() -> None:
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), normalize_std=False)
    assert advantages.tolist() == [[0.5, -0.5, -0.5, 0.5]]


def test_groups_of_different_sizes_in_any_order() -> None:
    rewards, index = torch.tensor([3.0, 1.0, 0.0, 5.0, 1.0]), torch.tensor([1, 0, 0, 1, 0])
    advantages = group_advantages(rewards, index, normalize_std=False)
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 1 / 3, -2 / 3, 1.0, 1 / 3]))
    normalized = group_advantages(rewards, index)
    torch.testing.assert_close(normalized[[0, 3]], group_advantages(rewards[[0, 3]][None])[0])
    torch.testing.assert_close(normalized[[1, 2, 4]], group_advantages(rewards[[1, 2, 4]][None])[0])


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_nothing(reward: float, dtype: torch.dtype) -> None:
    """Rounding of the mean, divided by eps, would be a gradient of its own."""
    assert (group_advantages(torch.full((2, 7), reward, dtype=dtype)) == 0).all()


def test_single_trajectory_and_none() -> None:
    assert group_advantages(torch.tensor([[0.7], [0.2]])).tolist() == [[0.0], [0.0]]
    assert group_advantages(torch.zeros(0, 8)).shape == (0, 8)


def test_shape_and_index_go_together() -> None:
    with pytest.raises(ValueError, match="group index"):
        group_advantages(torch.zeros(4))
    with pytest.raises(ValueError, match="group index"):
        group_advantages(torch.zeros(2, 2), torch.zeros(4, dtype=torch.int64))


def test_leave_one_out_subtracts_the_mean_of_the_others() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 7.0, 3.0])
    advantages = leave_one_out_advantages(rewards, torch.tensor([0, 0, 0, 1, 1]))
    torch.testing.assert_close(advantages, torch.tensor([1.0, -0.5, -0.5, 4.0, -4.0]))
    assert leave_one_out_advantages(torch.tensor([3.0]), torch.tensor([0])).tolist() == [0.0]


def test_whitening_weighs_by_tokens() -> None:
    # Two trajectories of 1 and 3 tokens: token values 4, 0, 0, 0 with mean 1 and variance (9 + 3) / 3 = 4.
    torch.testing.assert_close(
        whitened(torch.tensor([4.0, 0.0]), torch.tensor([1, 3]), eps=0.0), torch.tensor([1.5, -0.5])
    )
    assert whitened(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_no_estimator_sees_anything_in_equal_rewards(name: str) -> None:
    groups, lengths = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([3, 1, 4, 1, 5])
    advantages = ADVANTAGES[name]().estimate(torch.full((5,), 0.1, dtype=torch.float64), groups, lengths)
    assert advantages.tolist() == [0.0] * 5


def test_estimators_by_name() -> None:
    rewards, groups = torch.tensor([1.0, 0.0, 5.0, 3.0]), torch.tensor([0, 0, 1, 1])
    lengths = torch.tensor([1, 1, 1, 1])

    def of(name: str) -> torch.Tensor:
        return ADVANTAGES[name]().estimate(rewards, groups, lengths)

    torch.testing.assert_close(of("dr_grpo"), torch.tensor([0.5, -0.5, 1.0, -1.0]))
    torch.testing.assert_close(of("rloo"), torch.tensor([1.0, -1.0, 2.0, -2.0]))
    torch.testing.assert_close(
        of("grpo"), torch.tensor([1.0, -1.0, 1.0, -1.0]) / 2**0.5, rtol=1e-6 * 2**0.5 + gamma(12), atol=0
    )
    # mean 2.25, variance 59/12; differences have mean 0 and variance 5/6
    torch.testing.assert_close(of("reinforce_plus_plus"), torch.tensor([-1.25, -2.25, 2.75, 0.75]) / (59 / 12) ** 0.5)
    torch.testing.assert_close(
        of("reinforce_plus_plus_baseline"), torch.tensor([0.5, -0.5, 1.0, -1.0]) / (5 / 6) ** 0.5
    )
