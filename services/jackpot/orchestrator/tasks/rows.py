"""Reads rows of prompts and answers; errors name the unusable rows and the remedy."""

from __future__ import annotations

import codecs
import difflib
import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jackpot.errors import ConfigError
from jackpot.orchestrator.tasks.answers import final_answer
from jackpot.orchestrator.tasks.protocol import Prompt, TaskItem

NAMED_ROWS = 10  # how many bad rows an error names
_KEYS_REMEDY = "name the keys in task.params.prompt_key and answer_key; a dot goes into an object"
_TO_ROWS = {
    "csv": "import csv,json,sys;[print(json.dumps(r)) for r in csv.DictReader(open(sys.argv[1],encoding='utf-8-sig'))]",
    "array": "import json,sys;[print(json.dumps(r)) for r in json.load(open(sys.argv[1],encoding='utf-8-sig'))]",
    "messages": (
        "import json,sys;[print(json.dumps({'prompt':m[:-1],'answer':m[-1]['content']})) "
        "for m in (json.loads(l)['messages'] for l in open(sys.argv[1],encoding='utf-8-sig'))]"
    ),
    "parquet": (
        "import pyarrow.parquet as p,json,sys;"
        "[print(json.dumps(r,default=str)) for r in p.read_table(sys.argv[1]).to_pylist()]"
    ),
}


class RowFile:
    """A JSON Lines file of prompts and answers.

    Args:
        field: the parameter that names it, for errors.
        path: the file.
        prompt_key: key of the prompt in a row: a string or a list of chat messages. A dot selects within an object.
        answer_key: key of the answer, likewise: a text or a number.
    """

    def __init__(self, field: str, path: str, prompt_key: str, answer_key: str) -> None:
        self._field = f"task.params.{field}"
        self._path = path
        self._prompt_key = prompt_key
        self._answer_key = answer_key

    def items(self) -> list[TaskItem]:
        """One item per row; its metadata holds the ``answer`` as text and the ``line``.

        Raises:
            ConfigError: the file is missing, empty or of another format, or rows cannot be used (names their numbers).
        """
        rows = self._rows()
        prompts = {number: self._prompt(number, row) for number, row in rows.items()}
        answers = {number: self._value(number, row, self._answer_key) for number, row in rows.items()}
        self._refuse_answers({number: value for number, value in answers.items() if not _is_answer(value)})
        return [TaskItem(prompts[number], {"answer": str(answers[number]), "line": number}) for number in rows]

    def _rows(self) -> dict[int, Mapping[str, Any]]:
        try:
            content = Path(self._path).read_bytes().removeprefix(codecs.BOM_UTF8)
        except OSError as error:
            raise self._error(
                f"cannot be read ({error.strerror})",
                "Give the path of a JSON Lines file; relative paths start at the job file.",
            ) from None
        self._refuse_other_formats(content)
        lines = enumerate(content.split(b"\n"), start=1)  # str.splitlines would also split inside strings
        rows = {number: self._parse(number, line) for number, line in lines if line.strip()}
        if not rows:
            raise self._error("holds no prompts", "Put one JSON object on each line.")
        return rows

    def _refuse_other_formats(self, content: bytes) -> None:
        suffix = Path(self._path).suffix.lower()
        if content.startswith(b"PAR1"):
            raise self._error("is a Parquet file", self._conversion("parquet"))
        if suffix in (".csv", ".tsv") and not content.lstrip().startswith(b"{"):
            raise self._error("is a table", self._conversion("csv"))
        if content.lstrip().startswith(b"[") and _is_list_of_objects(content):
            raise self._error("is one JSON array", self._conversion("array"))

    def _parse(self, number: int, line: bytes) -> Mapping[str, Any]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError also for bytes that are not UTF-8
            raise self._error(f"line {number} is not JSON ({error})", "Correct the line.") from None
        if not isinstance(row, dict):
            raise self._error(f"line {number} is not a JSON object", 'Write {"prompt": …, "answer": …}.')
        return row

    def _value(self, number: int, row: Mapping[str, Any], key: str) -> Any:
        value: Any = row
        for part in (key,) if key in row else key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise self._missing(number, row, key)
            value = value[part]
        return value

    def _missing(self, number: int, row: Mapping[str, Any], key: str) -> ConfigError:
        if "messages" in row:
            return self._error(
                f"line {number} has no {key!r}: it is a conversation with the answer as its last message",
                self._conversion("messages"),
            )
        names = list(_names(row))
        near = difflib.get_close_matches(key, names, n=1) or sorted(names)
        return self._error(f"line {number} has no {key!r}", f"It has {', '.join(map(repr, near))}: {_KEYS_REMEDY}.")

    def _prompt(self, number: int, row: Mapping[str, Any]) -> Prompt:
        prompt = self._value(number, row, self._prompt_key)
        if isinstance(prompt, str) and prompt.strip():
            return prompt
        if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
            return prompt
        raise self._error(
            f"line {number}: the prompt is neither a string nor a list of chat messages",
            'Write a non-empty string, or [{"role": "user", "content": "…"}].',
        )

    def _refuse_answers(self, refused: Mapping[int, Any]) -> None:
        if not refused:
            return
        shown = [f"line {number} ({_brief(value)})" for number, value in list(refused.items())[:NAMED_ROWS]]
        more = f" and {len(refused) - NAMED_ROWS} more" if len(refused) > NAMED_ROWS else ""
        remedy = "Give each row its answer as a text or a number, or leave the row out"
        value = next(iter(refused.values()))
        if isinstance(value, dict) and value:
            keys = " or ".join(f"{self._answer_key}.{name}" for name in sorted(value))
            remedy = f"An answer is a text or a number: set task.params.answer_key to {keys}, or leave the row out"
        raise self._error(f"the answer {self._answer_key!r} is none in {', '.join(shown)}{more}", f"{remedy}.")

    def _conversion(self, kind: str) -> str:
        source, target = (shlex.quote(str(path)) for path in (self._path, Path(self._path).with_suffix(".rows.jsonl")))
        return f'Convert it: python -c "{_TO_ROWS[kind]}" {source} > {target}'

    def _error(self, problem: str, remedy: str) -> ConfigError:
        return ConfigError(self._field, self._path, problem, remedy)


def _is_answer(value: Any) -> bool:
    if isinstance(value, str):
        return bool(final_answer(value))
    return type(value) is int or (type(value) is float and math.isfinite(value))


def _is_list_of_objects(content: bytes) -> bool:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _names(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys of a row, including dotted keys for the objects in it."""
    inner = [name for key, value in row.items() if isinstance(value, dict) for name in _names(value, f"{prefix}{key}.")]
    return [*(prefix + key for key in row), *inner]


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:39]}…"
