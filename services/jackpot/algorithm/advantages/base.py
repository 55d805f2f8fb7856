"""What an advantage estimator is: how much better a completion was than could be expected. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jackpot.section import Section

if TYPE_CHECKING:
    from torch import Tensor


class Advantage(Section):
    """Base of all estimators. A subclass has a ``name`` with a default, and the estimate."""

    name: str
    filter_zero_variance: bool = False
    """Drop groups whose rewards are all equal before scoring (DAPO's dynamic sampling); they are counted as
    ``zero_variance`` and their slots go to the next prompts. Off, because such groups do distil the actor, and because
    a task that is solved, or hopeless, has no others: the run would wait for its batch in vain."""

    def estimate(self, rewards: Tensor, group_index: Tensor, num_tokens: Tensor) -> Tensor:
        """The advantage of each trajectory.

        Args:
            rewards: [trajectories] of a whole batch.
            group_index: [trajectories] int64, the group of each.
            num_tokens: [trajectories] int64, how many tokens each has; what whitening over the batch weighs by.

        Returns:
            [trajectories], without gradient.
        """
        raise NotImplementedError
