"""Checks that a model directory is complete, and that two models share a vocabulary. Reads only JSON; no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jackpot.config import JobSpec
from jackpot.errors import ConfigError

_COMPLETE = "Download or export the model again, complete with config.json, *.safetensors and tokenizer.json."
_ONE_FAMILY = "Use two models of one family that share tokenizer and vocabulary size."


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A model's vocabulary: the meaning of its token ids."""

    size: int  # rows of the model's output, padding included
    tokens: str  # the tokenizer's own vocabulary, as JSON in one order
    added: Mapping[int, str]  # tokens added to it, by id

    def difference(self, other: Vocabulary) -> str | None:
        """How this vocabulary differs from the policy's, or None.

        An added token that only one of the two has does not count: the other does not use its id, and models of one
        family often differ in this.
        """
        if self.size != other.size:
            return f"has another vocabulary than policy.model: {self.size} ids instead of {other.size}"
        if self.tokens != other.tokens:
            return "has another vocabulary than policy.model, so its tokens mean nothing to the policy"
        for token_id, content in self.added.items():
            if other.added.get(token_id, content) != content:
                return (
                    f"has another vocabulary than policy.model: id {token_id} is {content!r}, "
                    f"there {other.added[token_id]!r}"
                )
        return None


def check_models(job: JobSpec) -> None:
    """Check that the model directories are complete, and that policy and actor share a vocabulary.

    Raises:
        ConfigError: naming field, value and remedy.
    """
    policy = read_vocabulary("policy.model", job.policy.model)
    if isinstance(job.actor, str):
        return
    difference = read_vocabulary("actor.model", job.actor.model).difference(policy)
    if difference is not None:
        raise ConfigError("actor.model", job.actor.model, difference, _ONE_FAMILY)


def read_vocabulary(field: str, model: str) -> Vocabulary:
    """The vocabulary of a complete model directory.

    Args:
        field: the setting that names the directory, for the message.
        model: the directory, in Hugging Face format.

    Raises:
        ConfigError: the directory is not there, or a file in it is missing or damaged.
    """
    directory = Path(model)
    if not directory.is_dir():
        raise ConfigError(field, model, "is not a directory", "Give a model directory in Hugging Face format.")
    config = _read_json(field, directory / "config.json")
    tokenizer = _read_json(field, directory / "tokenizer.json")
    _check_weights(field, directory)
    text = config.get("text_config")
    size = (text if isinstance(text, dict) else config).get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise ConfigError(field, model, "its config.json has no vocab_size", _COMPLETE)
    try:
        tokens = tokenizer["model"]["vocab"]
        added = {int(token["id"]): str(token["content"]) for token in tokenizer.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError):
        raise ConfigError(field, model, "its tokenizer.json holds no vocabulary", _COMPLETE) from None
    return Vocabulary(size, json.dumps(tokens, sort_keys=True), added)


def _check_weights(field: str, directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        if next(directory.glob("*.safetensors"), None) is None:
            raise ConfigError(field, str(directory), "holds no *.safetensors", _COMPLETE)
        return
    shards = _read_json(field, index).get("weight_map")
    if not isinstance(shards, dict):
        raise ConfigError(field, str(directory), f"its {index.name} has no weight_map", _COMPLETE)
    missing = sorted({str(shard) for shard in shards.values() if not (directory / str(shard)).is_file()})
    if missing:
        raise ConfigError(field, str(directory), f"lacks {', '.join(missing)}", _COMPLETE)


def _read_json(field: str, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(field, str(path.parent), f"holds no {path.name}", _COMPLETE) from None
    except (OSError, ValueError) as error:
        raise ConfigError(field, str(path.parent), f"its {path.name} cannot be read ({error})", _COMPLETE) from None
    if not isinstance(data, dict):
        raise ConfigError(field, str(path.parent), f"its {path.name} is not a JSON object", _COMPLETE)
    return data
