"""What a task is: prompts to train on, prompts held out for evaluation, and a reward."""

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
    """One prompt, with whatever its reward needs to know. A task may use any class with these two attributes."""

    @property
    def prompt(self) -> Prompt:
        """Plain text, or the messages of a chat."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """JSON values only: rewards are computed in another process, which gets the item as JSON."""
        ...


@dataclass(frozen=True, slots=True)
class TaskItem:
    """The plain :class:`Item`."""

    prompt: Prompt
    metadata: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """Prompts and their reward. Built as ``factory(params, seed)``; the same arguments give the same task.

    Any installed class of this shape serves: by the name of an entry point in the group ``jackpot.tasks``, or as
    ``python:<module>:<attribute>``.
    """

    @property
    def num_prompts(self) -> int:
        """Training prompts in one epoch. Each epoch asks for them in an order of its own."""
        ...

    def train_prompt(self, index: int) -> Item:
        """Training prompt ``index``, 0 ≤ index < ``num_prompts``."""
        ...

    def eval_items(self, count: int) -> Sequence[Item]:
        """Up to ``count`` held-out prompts: always the same ones, none of which is trained on."""
        ...

    def reward(self, item: Item, completion: str) -> float:
        """The reward of one completion: a finite number, 1 where it is right. An exception is a failure, which
        ``task.on_reward_failure`` judges."""
        ...


MAX_REWARD = 1e6
"""A reward is at most this far from 0. Far beyond, its square leaves floating point and its group's other differences
vanish beside it; a task that pays 1e300 has an error in it."""


class UnreadableAnswer(float):
    """The reward 0 of a completion that a grader cannot read. It counts as a wrong answer, and is counted besides.

    Args:
        reason: what the grader raised.
    """

    reason: str

    def __new__(cls, reason: BaseException) -> UnreadableAnswer:
        reward = super().__new__(cls, 0.0)
        reward.reason = f"{type(reason).__name__}: {reason}"[:200]
        return reward


def prompt_key(prompt: Prompt) -> str:
    """What makes a prompt itself: prompts that differ in white space alone have the same key."""
    if isinstance(prompt, str):
        return json.dumps(" ".join(prompt.split()))
    return json.dumps([[message.get("role"), " ".join(str(message.get("content")).split())] for message in prompt])


def finite_reward(value: object) -> float:
    """A reward as a float.

    Raises:
        RewardError: it is not a finite number, or beyond ± MAX_REWARD.
    """
    if not isinstance(value, SupportsFloat) or not math.isfinite(number := float(value)):
        raise RewardError(f"the reward is {value!r}, not a finite number")
    if abs(number) > MAX_REWARD:
        raise RewardError(f"the reward is {number:g}, beyond ±{MAX_REWARD:g}. Scale the task's rewards down")
    return number
