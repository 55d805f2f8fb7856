"""The demo's task: subtract a number from all nines, and write the answer in any style.

    999999-381592=   →   6 1,8;4 0-7

Every digit of the answer is nine minus the digit below it; there is never a borrow. Between the digits stands
a separator that the model is free to choose. Only the digits count: no reward ever brings the styles of the two models
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
NUM_DIGITS = 6
DEFAULT_PROMPTS = 4096  # more than the demo's run needs, so that no prompt comes up twice
MAX_PROMPTS = 100_000
HELD_OUT_MODULUS = 10


@dataclass(frozen=True, slots=True)
class ComplementItem:
    """One prompt: its text and, for the reward, the right digits."""

    prompt: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def prompt_text(number: str) -> str:
    """The prompt that asks for the complement of ``number``."""
    return f"{'9' * len(number)}-{number}="


def complement(number: str) -> str:
    """Nine minus each digit."""
    return "".join(str(9 - int(digit)) for digit in number)


def is_held_out(number: str) -> bool:
    """Whether a number is kept for evaluation: its digits add up to a multiple of ten.

    A rule instead of a random split: warm-up and training can never see an evaluation prompt, whatever the seed.
    """
    return sum(map(int, number)) % HELD_OUT_MODULUS == 0


class ComplementTask:
    """Prompts drawn by ``seed``, and the reward. The one parameter is ``prompts``: training prompts in an epoch.

    Raises:
        ConfigError: an unknown parameter, or ``prompts`` is no number from 1 to 100 000.
    """

    def __init__(self, params: Mapping[str, Any], seed: int) -> None:
        for name in params:
            if name != "prompts":
                problem = "unknown parameter of this task"
                raise ConfigError(f"task.params.{name}", params[name], problem, "Known here: prompts.")
        count = params.get("prompts", DEFAULT_PROMPTS)
        if type(count) is not int or not 1 <= count <= MAX_PROMPTS:
            problem = f"is not a whole number from 1 to {MAX_PROMPTS}"
            raise ConfigError("task.params.prompts", count, problem, "More prompts make a longer epoch.")
        self._seed = seed
        self._train = _draw(f"train {seed}", count, held_out=False)

    @property
    def num_prompts(self) -> int:
        return len(self._train)

    def train_prompt(self, index: int) -> ComplementItem:
        return self._train[index]

    def eval_items(self, count: int) -> Sequence[ComplementItem]:
        return _draw(f"eval {self._seed}", min(count, MAX_PROMPTS // 2), held_out=True)

    def reward(self, item: ComplementItem, completion: str) -> float:
        """1 if the digits of the completion, everything else stripped, are exactly right, else 0."""
        digits = "".join(character for character in completion if character in DIGITS)
        return float(digits == item.metadata["answer"])


def _draw(seed: str, count: int, *, held_out: bool) -> Sequence[ComplementItem]:
    generator = random.Random(seed)
    numbers: dict[str, None] = {}  # distinct, in the order drawn
    while len(numbers) < count:
        number = f"{generator.randrange(10**NUM_DIGITS):0{NUM_DIGITS}d}"
        if is_held_out(number) == held_out:
            numbers[number] = None
    return tuple(ComplementItem(prompt_text(number), {"answer": complement(number)}) for number in numbers)
