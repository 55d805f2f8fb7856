"""Generated problems with verifiers: the datasets of reasoning-gym."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from jackpot.errors import ConfigError
from jackpot.orchestrator.tasks.answers import tagged_answer
from jackpot.orchestrator.tasks.params import read, refuse_unknown
from jackpot.orchestrator.tasks.protocol import Item, TaskItem, UnreadableAnswer

OWN_PARAMS = ("size", "answer_tag")
DEFAULT_SIZE = 10_000  # prompts in an epoch; reasoning-gym's default of 500 would repeat too often
HELD_OUT_ONE_IN = 4  # never train on a quarter of all questions
REDRAWS = 64  # a probability of (3/4)^64 to miss the held-out quarter, unless the questions hardly vary
SEED_BITS = 28  # leaves room for redraws and the evaluation's range below 2^31, the limit of every generator
EVAL_SEED_OFFSET = 1 << 30
_VARY = "Choose parameters under which questions vary more."


class ReasoningGymTask:
    """``reasoning_gym:<name>``: procedural problems; the dataset's ``score_answer`` is the reward.

    Parameters: those of the dataset; ``size``, prompts in an epoch (default 10 000); ``answer_tag`` to read only
    ``<tag>…</tag>`` of a completion (default: the whole completion, stripped). A hash of its text decides whether a
    question is held out, so that training and evaluation never overlap although problems are drawn at random.

    Raises:
        ConfigError: reasoning-gym is not installed, the dataset is unknown, or the dataset refuses a parameter.
    """

    def __init__(self, name: str, params: Mapping[str, Any], seed: int) -> None:
        try:
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ConfigError(
                "task.name",
                f"reasoning_gym:{name}",
                f"needs reasoning-gym, which is not installed ({error})",
                "Install the extra: pip install 'jackpot[reasoning-gym]'; it takes a C compiler.",
            ) from None
        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS, n=3)
            remedy = (
                f"Did you mean {' or '.join(map(repr, near))}?" if near else "See reasoning-gym's list of datasets."
            )
            raise ConfigError("task.name", f"reasoning_gym:{name}", "unknown reasoning-gym dataset", remedy)
        known = {field.name for field in dataclasses.fields(DATASETS[name][1])} - {"seed"}
        refuse_unknown(params, known | set(OWN_PARAMS))
        size = read(params, "size", int, DEFAULT_SIZE)
        if not 1 <= size < 1 << 22:
            raise ConfigError("task.params.size", size, "is not between 1 and 4194303", "Give an epoch's prompts.")
        self._answer_tag = read(params, "answer_tag", str, "") or None
        source = _Source(name, {key: value for key, value in params.items() if key not in OWN_PARAMS}, size, seed)
        source.dataset(0)  # a bad parameter must fail here
        self._source = source

    @property
    def num_prompts(self) -> int:
        return self._source.size

    def train_prompt(self, index: int) -> TaskItem:
        item = self._draw(index, held_out=False, offset=0)
        if item is None:
            raise ConfigError("task.params", index, "every question drawn for this prompt is held out", _VARY)
        return item

    def eval_items(self, count: int) -> Sequence[TaskItem]:
        # If the questions hardly vary, all may be training questions: then there are fewer items, or none.
        items = (self._draw(index, held_out=True, offset=EVAL_SEED_OFFSET) for index in range(count))
        return [item for item in itertools.takewhile(lambda item: item is not None, items) if item is not None]

    def reward(self, item: Item, completion: str) -> float:
        answer = completion.strip() if self._answer_tag is None else tagged_answer(completion, self._answer_tag)
        # The entry as drawn, not drawn again: some generators depend on the hash seed of their process.
        entry = entry_from_json(item.metadata["entry"])
        try:
            return float(self._source.dataset(0).score_answer(answer, entry))
        except Exception as error:  # graders parse model output and may raise any error of their parsers
            return UnreadableAnswer(error)

    def _draw(self, index: int, *, held_out: bool, offset: int) -> TaskItem | None:
        # A question of the wrong side is replaced by the same index in the next range of seeds.
        ranges = [offset + draw * self._source.size for draw in range(REDRAWS)]
        entries = (self._source.entry(start, index) for start in ranges)
        entry = next((entry for entry in entries if _is_held_out(entry["question"]) == held_out), None)
        if entry is None:
            return None
        return TaskItem(entry["question"], {"answer": str(entry["answer"]), "entry": entry_to_json(entry)})


def entry_to_json(value: Any) -> Any:
    """An entry's value as JSON from which :func:`entry_from_json` restores it, including tuples and keys of any type.

    Some graders compare with ``==``, and a tuple does not equal a list.
    """
    if isinstance(value, tuple):
        return {"tuple": [entry_to_json(part) for part in value]}
    if isinstance(value, list):
        return [entry_to_json(part) for part in value]
    if isinstance(value, dict):
        return {"dict": [[entry_to_json(key), entry_to_json(part)] for key, part in value.items()]}
    return value if value is None or isinstance(value, (bool, int, float, str)) else {"text": str(value)}


def entry_from_json(value: Any) -> Any:
    """The value that :func:`entry_to_json` received, except that objects of other types become their texts."""
    if isinstance(value, list):
        return [entry_from_json(part) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "text":
        return content
    if kind == "tuple":
        return tuple(entry_from_json(part) for part in content)
    return {entry_from_json(key): entry_from_json(part) for key, part in content}


class _Source:
    """The entries of one reasoning-gym dataset, in any number of disjoint ranges of seeds."""

    def __init__(self, name: str, params: Mapping[str, Any], size: int, seed: int) -> None:
        self.size = size
        self._name = name
        self._params = params
        digest = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=8).digest()
        self._seed = int.from_bytes(digest, "little") % (1 << SEED_BITS)
        self._datasets: dict[int, Any] = {}
        # Evaluation reads its entries repeatedly; some generators take a second per entry.
        self.entry = functools.lru_cache(maxsize=4096)(self._generate)

    def _generate(self, offset: int, index: int) -> dict[str, Any]:
        dataset, before = self.dataset(offset), random.getstate()
        random.seed(f"{self._seed + offset} {index}")  # a few datasets draw from the generator that all share
        try:
            entry: dict[str, Any] = dataset[index]
        finally:
            random.setstate(before)
        return entry

    def dataset(self, offset: int) -> Any:
        """The dataset whose seeds start ``offset`` after the task's seed."""
        if offset not in self._datasets:
            import reasoning_gym

            try:
                self._datasets[offset] = reasoning_gym.create_dataset(
                    self._name, seed=self._seed + offset, size=self.size, **self._params
                )
            except (AssertionError, TypeError, ValueError, KeyError) as error:  # the errors of its configurations
                raise ConfigError(
                    "task.params", dict(self._params), f"refused by reasoning-gym: {error}", "Correct the parameters."
                ) from None
        return self._datasets[offset]


def _is_held_out(question: str) -> bool:
    return hashlib.blake2b(question.encode(), digest_size=8).digest()[0] % HELD_OUT_ONE_IN == 0
