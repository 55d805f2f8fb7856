"""The demo's task: subtract a number from all nines, and write the answer in any style.

    999999-381592=   →   6 1,8;4 0-7

Every digit of the answer is nine minus the digit below it; there is never a borrow. Between the digits stands
a separator of the model's choice. Only the digits are rewarded, so that no reward brings the styles of the two models
together. The actor prefers other separators than the policy and errs more often; that is the mismatch.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jackpot.errors import ConfigError

DIGITS = "0123456789"
SEPARATORS = " ,;.:-/_|+*~!?#$%&@^<>(){}"
NUM_DIGITS = 6  # of the demo
MAX_DIGITS = 14  # longer prompts and answers exceed the built-in models' 64 positions
DEFAULT_PROMPTS = 4096  # more than the demo's run needs, so that no prompt repeats
MAX_PROMPTS = 100_000
HELD_OUT_MODULUS = 10


@dataclass(frozen=True, slots=True)
class ComplementItem:
    """One prompt: its text and, for the reward, the correct digits."""

    prompt: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def prompt_text(number: str) -> str:
    """The prompt that asks for the complement of ``number``."""
    return f"{'9' * len(number)}-{number}="


def complement(number: str) -> str:
    """Nine minus each digit."""
    return "".join(str(9 - int(digit)) for digit in number)


def is_held_out(number: str) -> bool:
    """Whether a number is held out for evaluation: its digits add up to a multiple of ten.

    A rule instead of a random split: warm-up and training can never see an evaluation prompt, whatever the seed.
    """
    return sum(map(int, number)) % HELD_OUT_MODULUS == 0


class ComplementTask:
    """Prompts drawn by ``seed``, and the reward. Parameters: ``prompts``, training prompts in an epoch, and ``digits``,
    the length of the numbers: the models' own, 6 unless they were warmed up on others.

    Raises:
        ConfigError: unknown parameter, ``prompts`` not a number from 1 to 100 000, or ``digits`` not one from 6 to 14.
    """

    def __init__(self, params: Mapping[str, Any], seed: int) -> None:
        for name in params:
            if name not in ("prompts", "digits"):
                problem = "unknown parameter of this task"
                raise ConfigError(f"task.params.{name}", params[name], problem, "Known here: digits, prompts.")
        count = _whole(params, "prompts", DEFAULT_PROMPTS, 1, MAX_PROMPTS, "More prompts make a longer epoch.")
        remedy = "Models read numbers of the length that they were warmed up on."
        self._num_digits = _whole(params, "digits", NUM_DIGITS, NUM_DIGITS, MAX_DIGITS, remedy)
        self._seed = seed
        self._train = self._draw(f"train {seed}", count, held_out=False)

    @property
    def num_prompts(self) -> int:
        return len(self._train)

    def train_prompt(self, index: int) -> ComplementItem:
        return self._train[index]

    def eval_items(self, count: int) -> Sequence[ComplementItem]:
        return self._draw(f"eval {self._seed}", min(count, MAX_PROMPTS // 2), held_out=True)

    def reward(self, item: ComplementItem, completion: str) -> float:
        """1 if the digits of the completion, everything else stripped, are exactly right, else 0."""
        digits = "".join(character for character in completion if character in DIGITS)
        return float(digits == item.metadata["answer"])

    def _draw(self, seed: str, count: int, *, held_out: bool) -> Sequence[ComplementItem]:
        generator = random.Random(seed)
        numbers: dict[str, None] = {}  # distinct, in the order drawn
        while len(numbers) < count:
            number = f"{generator.randrange(10**self._num_digits):0{self._num_digits}d}"
            if is_held_out(number) == held_out:
                numbers[number] = None
        return tuple(ComplementItem(prompt_text(number), {"answer": complement(number)}) for number in numbers)


def _whole(params: Mapping[str, Any], name: str, default: int, least: int, most: int, remedy: str) -> int:
    value = params.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"task.params.{name}", value, f"is not a whole number from {least} to {most}", remedy)
    return value
