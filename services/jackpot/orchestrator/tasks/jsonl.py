"""A file of prompts and answers, one JSON object a line."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jackpot.errors import ConfigError
from jackpot.orchestrator.tasks.answers import REWARDS, tagged_answer
from jackpot.orchestrator.tasks.params import read, refuse_unknown
from jackpot.orchestrator.tasks.protocol import Item, Prompt, TaskItem

PARAMS = ("path", "eval_path", "eval_fraction", "prompt_key", "answer_key", "reward", "answer_tag")


class JsonlTask:
    """Prompts and answers from a JSON Lines file.

    Parameters: ``path``; ``eval_path``, or ``eval_fraction`` of the distinct prompts held out (default 0.1);
    ``prompt_key`` (default ``prompt``; its value is a string or a list of chat messages); ``answer_key`` (default
    ``answer``); ``reward``, ``exact_match`` (default) or ``math_verify``; ``answer_tag`` to look only into
    ``<tag>…</tag>`` of a completion. Training never sees a held-out prompt.

    Raises:
        ConfigError: a parameter cannot work, a file is missing or empty, or a line cannot be read (with its number).
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
        excluded = {_prompt_key(item) for item in held_out}
        self._eval = sorted(held_out, key=lambda item: _rank(item, seed))
        self._train = [item for item in items if _prompt_key(item) not in excluded]
        if not self._train:
            raise ConfigError(
                "task.params.path",
                params["path"],
                "has no prompt left to train on: all are held out for evaluation",
                "Add prompts, or name another file as eval_path.",
            )

    @property
    def num_prompts(self) -> int:
        return len(self._train)

    def train_prompt(self, index: int) -> TaskItem:
        return self._train[index]

    def eval_items(self, count: int) -> Sequence[TaskItem]:
        return self._eval[:count]

    def reward(self, item: Item, completion: str) -> float:
        answer = completion if self._answer_tag is None else tagged_answer(completion, self._answer_tag)
        return 0.0 if answer is None else self._reward(item.metadata["answer"], answer)


def _hold_out(items: Sequence[TaskItem], fraction: float, seed: int) -> list[TaskItem]:
    if not 0 < fraction < 1:
        raise ConfigError(
            "task.params.eval_fraction", fraction, "is not between 0 and 1", "Hold out a part of the prompts, e.g. 0.1."
        )
    # By the prompt and not by the line: a prompt that stands twice must not be on both sides.
    distinct = {_prompt_key(item): item for item in items}
    ranked = sorted(distinct.values(), key=lambda item: _rank(item, seed))
    return ranked[: max(1, round(fraction * len(ranked)))]


def _prompt_key(item: TaskItem) -> str:
    return json.dumps(item.prompt)


def _rank(item: TaskItem, seed: int) -> bytes:
    return hashlib.blake2b(_prompt_key(item).encode(), key=seed.to_bytes(8, "little"), digest_size=16).digest()


def _read_items(params: Mapping[str, Any], field: str) -> list[TaskItem]:
    path = read(params, field, str)
    prompt_key = read(params, "prompt_key", str, "prompt")
    answer_key = read(params, "answer_key", str, "answer")
    items = []
    try:
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row = _parse_line(f"task.params.{field}", path, number, line)
                    prompt = _value(row, prompt_key, field, path, number)
                    answer = _value(row, answer_key, field, path, number)
                    items.append(TaskItem(_checked_prompt(prompt, field, path, number), {"answer": str(answer)}))
    except OSError as error:
        raise ConfigError(
            f"task.params.{field}",
            path,
            f"cannot be read ({error.strerror})",
            "Give the path of a JSON Lines file; relative paths start at the job file.",
        ) from None
    if not items:
        raise ConfigError(f"task.params.{field}", path, "holds no prompts", "Put one JSON object on each line.")
    return items


def _parse_line(field: str, path: str, number: int, line: bytes) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:  # also raised for bytes that are not UTF-8
        raise ConfigError(field, path, f"line {number} is not JSON ({error})", "Correct the line.") from None
    if not isinstance(row, dict):
        raise ConfigError(field, path, f"line {number} is not a JSON object", 'Write {"prompt": …, "answer": …}.')
    return row


def _value(row: Mapping[str, Any], key: str, field: str, path: str, number: int) -> Any:
    if key in row:
        return row[key]
    near = difflib.get_close_matches(key, list(row), n=1) or sorted(row)
    hint = f"It has {', '.join(map(repr, near))}: name the keys in task.params.prompt_key and answer_key."
    raise ConfigError(f"task.params.{field}", path, f"line {number} has no {key!r}", hint)


def _checked_prompt(prompt: Any, field: str, path: str, number: int) -> Prompt:
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        return prompt
    raise ConfigError(
        f"task.params.{field}",
        path,
        f"line {number}: the prompt is neither a string nor a list of chat messages",
        'Write a non-empty string, or [{"role": "user", "content": "…"}].',
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
