"""A file of prompts and answers, one JSON object per line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jackpot.errors import ConfigError
from jackpot.orchestrator.tasks.answers import exact_match, tagged_answer
from jackpot.orchestrator.tasks.mathematics import math_verify
from jackpot.orchestrator.tasks.params import read, refuse_unknown
from jackpot.orchestrator.tasks.protocol import Item, TaskItem, UnreadableAnswer, prompt_key
from jackpot.orchestrator.tasks.rows import RowFile

REWARDS: Mapping[str, Callable[[str, str], float]] = {"exact_match": exact_match, "math_verify": math_verify}
PARAMS = ("path", "eval_path", "eval_fraction", "prompt_key", "answer_key", "reward", "answer_tag")


class JsonlTask:
    """Prompts and answers from a JSON Lines file.

    Parameters: ``path``; ``eval_path``, or ``eval_fraction`` of the distinct prompts held out (default 0.1);
    ``prompt_key`` (default ``prompt``; its value is a string or a list of chat messages); ``answer_key`` (default
    ``answer``; a text or a number; a dot in a key selects within an object); ``reward``, either ``exact_match``
    (default: the completion is the answer and nothing else) or ``math_verify`` (the completion states an answer that is
    mathematically equal); ``answer_tag`` to read only ``<tag>…</tag>`` of a completion. Training never sees a held-out
    prompt; prompts that differ only in white space count as one.

    Raises:
        ConfigError: a parameter cannot work, a file is missing or empty, or rows cannot be used (names their numbers).
    """

    def __init__(self, params: Mapping[str, Any], seed: int) -> None:
        refuse_unknown(params, PARAMS)
        name = read(params, "reward", str, "exact_match")
        if name not in REWARDS:
            raise ConfigError("task.params.reward", name, "unknown reward", f"Use one of {', '.join(REWARDS)}.")
        self._reward = REWARDS[name]
        self._answer_tag = read(params, "answer_tag", str, "") or None
        items = _read_items(params, "path")
        if params.get("eval_path") is not None:
            held_out = _read_items(params, "eval_path")
        else:
            held_out = _hold_out(items, read(params, "eval_fraction", float, 0.1), seed)
        excluded = {prompt_key(item.prompt) for item in held_out}
        self._eval = sorted(held_out, key=lambda item: _rank(item, seed))
        self._train = [item for item in items if prompt_key(item.prompt) not in excluded]
        if not self._train:
            raise ConfigError(
                "task.params.path",
                params["path"],
                "has no prompt left to train on: all are held out for evaluation",
                "Add prompts that differ in more than white space, or name another file as eval_path.",
            )

    @property
    def num_prompts(self) -> int:
        return len(self._train)

    def train_prompt(self, index: int) -> TaskItem:
        return self._train[index]

    def eval_items(self, count: int) -> Sequence[TaskItem]:
        return self._eval[:count]

    def load_grader(self) -> None:
        """Import the reward's libraries, which takes a second, before its time limit starts."""
        self._reward("1", "2")  # two different values, so that every part runs

    def reward(self, item: Item, completion: str) -> float:
        answer = completion if self._answer_tag is None else tagged_answer(completion, self._answer_tag)
        if answer is None:
            return 0.0
        try:
            return self._reward(item.metadata["answer"], answer)
        except Exception as error:  # a text that makes the mathematics parser fail is not a right answer
            return UnreadableAnswer(error)


def _hold_out(items: Sequence[TaskItem], fraction: float, seed: int) -> list[TaskItem]:
    if not 0 < fraction < 1:
        raise ConfigError(
            "task.params.eval_fraction", fraction, "is not between 0 and 1", "Hold out a part of the prompts, e.g. 0.1."
        )
    # Decided by the prompt, not by the line: a repeated prompt must not be on both sides.
    distinct = {prompt_key(item.prompt): item for item in items}
    ranked = sorted(distinct.values(), key=lambda item: _rank(item, seed))
    return ranked[: max(1, round(fraction * len(ranked)))]


def _rank(item: TaskItem, seed: int) -> bytes:
    key = prompt_key(item.prompt).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(key, key=seed.to_bytes(8, "little"), digest_size=16).digest()


def _read_items(params: Mapping[str, Any], field: str) -> list[TaskItem]:
    prompt, answer = read(params, "prompt_key", str, "prompt"), read(params, "answer_key", str, "answer")
    return RowFile(field, read(params, field, str), prompt, answer).items()
