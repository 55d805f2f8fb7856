"""The interface of advantage estimators: how much better a completion is than expected. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jackpot.section import Section

if TYPE_CHECKING:
    from torch import Tensor


class Advantage(Section):
    """Base of all estimators. A subclass has a ``name`` with a default and implements the estimate."""

    name: str
    filter_zero_variance: bool = False
    """Drop groups whose rewards are all equal before scoring (DAPO's dynamic sampling). They are counted as
    ``zero_variance``, and their slots go to the next prompts. Off by default, because such groups still distil the
    actor, and because a task that is solved, or hopeless, has no other groups: the run would never fill its batch."""

    def estimate(self, rewards: Tensor, group_index: Tensor, num_tokens: Tensor) -> Tensor:
        """The advantage of each trajectory.

        Args:
            rewards: [trajectories] of a whole batch.
            group_index: [trajectories] int64, the group of each.
            num_tokens: [trajectories] int64, the tokens of each: the weights for whitening over the batch.

        Returns:
            [trajectories], without gradient.
        """
        raise NotImplementedError
