"""Checks that model directories can be used, and that two models share a vocabulary. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jackpot.compute.common_vocabulary import vocabulary_rows
from jackpot.config import JobSpec
from jackpot.errors import ConfigError
from jackpot.storage.model_configuration import served_context
from jackpot.storage.model_files import COMPLETE, check_numbers, read_json
from jackpot.storage.model_support import check_model_directory

_ONE_FAMILY = "Use two models of one family that share a tokenizer."


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A model's vocabulary: the meaning of its token ids."""

    size: int  # rows of the model's output, padding included
    num_tokens: int  # of the tokenizer, up to the greatest id that is not added
    tokens: str  # the tokenizer's own vocabulary, as JSON in one order
    added: Mapping[int, str]  # tokens added to it, by id

    def difference(self, other: Vocabulary) -> str | None:
        """How this vocabulary differs from the policy's, or None.

        An added token that only one of the two has does not count: the other does not use its id, and models of one
        family often differ in this. Nor do different numbers of rows: those that only one has are padding.
        """
        if self.tokens != other.tokens:
            return "has another vocabulary than policy.model, so its tokens mean nothing to the policy"
        for token_id, content in self.added.items():
            if other.added.get(token_id, content) != content:
                return (
                    f"has another vocabulary than policy.model: id {token_id} is {content!r}, "
                    f"there {other.added[token_id]!r}"
                )
        if self.size != other.size and (rows := min(self.size, other.size)) < self.num_tokens:
            return f"and policy.model have only {rows} rows in common, and their tokenizer has {self.num_tokens} tokens"
        return None


def check_models(job: JobSpec) -> None:
    """Check that the job's models are whole and can be served, and that policy and actor share a vocabulary.

    Raises:
        ConfigError: naming field, value and remedy.
    """
    models = {"policy.model": job.policy} | ({} if isinstance(job.actor, str) else {"actor.model": job.actor})
    for field, config in models.items():
        described = check_model_directory(field, config.model, job.rollout.engine)
        served_context(field, config.model, described, config.context_length)
        check_numbers(field, Path(config.model))
    policy = read_vocabulary("policy.model", job.policy.model)
    if isinstance(job.actor, str):
        return
    difference = read_vocabulary("actor.model", job.actor.model).difference(policy)
    if difference is not None:
        raise ConfigError("actor.model", job.actor.model, difference, _ONE_FAMILY)


def report_vocabulary(job: JobSpec) -> list[str]:
    """What a user should know of the two models' vocabularies: nothing, or that one is padded further.

    Raises:
        ConfigError: a config.json does not state vocab_size.
    """
    if isinstance(job.actor, str):
        return []
    policy = vocabulary_rows("policy.model", job.policy.model)
    actor = vocabulary_rows("actor.model", job.actor.model)
    if policy == actor:
        return []
    return [
        f"vocabulary: the policy has rows for {policy:,} token ids and the actor for {actor:,}; the first "
        f"{min(policy, actor):,} are used, the others are padding, which has no probability"
    ]


def read_vocabulary(field: str, model: str) -> Vocabulary:
    """The vocabulary of a complete model directory.

    Args:
        field: the setting that names the directory, for the message.
        model: the directory, in Hugging Face format.

    Raises:
        ConfigError: config.json or tokenizer.json is missing or damaged.
    """
    size = vocabulary_rows(field, model)
    tokenizer = read_json(field, Path(model) / "tokenizer.json")
    try:
        tokens = tokenizer["model"]["vocab"]
        added = {int(token["id"]): str(token["content"]) for token in tokenizer.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError):
        raise ConfigError(field, model, "its tokenizer.json holds no vocabulary", COMPLETE) from None
    ids = tokens.values() if isinstance(tokens, dict) else range(len(tokens))
    return Vocabulary(size, 1 + max(ids, default=-1), json.dumps(tokens, sort_keys=True), added)
