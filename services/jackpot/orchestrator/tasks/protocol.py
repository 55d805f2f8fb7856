"""The interface of a task: prompts to train on, prompts held out for evaluation, and a reward."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, SupportsFloat, runtime_checkable

from jackpot.errors import RewardError

Message = Mapping[str, str]  # {"role": "user", "content": "…"}
Prompt = str | Sequence[Message]


class Item(Protocol):
    """One prompt, with the data that its reward needs. A task may use any class with these two attributes."""

    @property
    def prompt(self) -> Prompt:
        """Plain text, or the messages of a chat."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """JSON values only: another process computes rewards and receives the item as JSON."""
        ...


@dataclass(frozen=True, slots=True)
class TaskItem:
    """The plain :class:`Item`."""

    prompt: Prompt
    metadata: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """Prompts and their reward. Created by ``factory(params, seed)``; the same arguments give the same task.

    A job may name any installed class with this interface: by its entry point in the group ``jackpot.tasks``, or as
    ``python:<module>:<attribute>``.
    """

    @property
    def num_prompts(self) -> int:
        """Number of training prompts in one epoch. Each epoch uses them in a different order."""
        ...

    def train_prompt(self, index: int) -> Item:
        """Training prompt ``index``, 0 ≤ index < ``num_prompts``."""
        ...

    def eval_items(self, count: int) -> Sequence[Item]:
        """Up to ``count`` held-out prompts: always the same ones, none of them a training prompt."""
        ...

    def reward(self, item: Item, completion: str) -> float:
        """The reward of one completion: a finite number, 1 if it is right. An exception is a failure, which is handled
        according to ``task.on_reward_failure``."""
        ...


MAX_REWARD = 1e6
"""The largest absolute reward. Much larger ones overflow when squared and hide the other differences in their group;
a task that pays 1e300 has a bug."""


class UnreadableAnswer(float):
    """The reward 0 of a completion that a grader cannot read: a wrong answer that is also counted separately.

    Args:
        reason: the grader's error.
    """

    reason: str

    def __new__(cls, reason: BaseException) -> UnreadableAnswer:
        reward = super().__new__(cls, 0.0)
        reward.reason = f"{type(reason).__name__}: {reason}"[:200]
        return reward


def prompt_key(prompt: Prompt) -> str:
    """A prompt's identity: prompts that differ only in white space have the same key."""
    if isinstance(prompt, str):
        return json.dumps(" ".join(prompt.split()))
    return json.dumps([[message.get("role"), " ".join(str(message.get("content")).split())] for message in prompt])


def finite_reward(value: object) -> float:
    """A reward as a float.

    Raises:
        RewardError: the reward is not a finite number within ± MAX_REWARD.
    """
    if not isinstance(value, SupportsFloat) or not math.isfinite(number := float(value)):
        raise RewardError(f"the reward is {value!r}, not a finite number")
    if abs(number) > MAX_REWARD:
        raise RewardError(f"the reward is {number:g}, beyond ±{MAX_REWARD:g}. Scale the task's rewards down")
    return number
