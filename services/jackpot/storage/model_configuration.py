"""What a config.json says of the sequences that a model takes: how long, with which rotary frequencies. No torch.

Some rotary embeddings change their frequencies with the longest position of a *pass*. A token's probability would then
depend on the sequences that share its pass, and on how far its own will yet grow. Here they are fixed once for a job:
see docs/models.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jackpot.errors import ConfigError

POSITION_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
"""The longest sequence, as models' configurations name it."""
_LONGROPE = ("longrope", "su")  # su is its former name
_PHI3_DEFAULT = 4096  # transformers' default of original_max_position_embeddings


@dataclass(frozen=True, slots=True)
class ServedContext:
    """The sequences that a job uses a model on."""

    positions: int | None
    """Tokens of the longest, prompt and completion together; None where neither model nor job says."""
    factors: Literal["short", "long"] | None = None
    """Which factors a longrope model has, for sequences of every length; None for other models."""


def served_context(field: str, model: str, config: Mapping[str, Any], context_length: int | None) -> ServedContext:
    """What a job may ask of a model.

    Args:
        field: the setting that names the model, ``policy.model`` or ``actor.model``.
        model: its directory.
        config: its config.json.
        context_length: the job's own limit, ``policy.context_length`` or ``actor.context_length``.

    Raises:
        ConfigError: the model has fewer positions than the job asks for.
    """
    text = text_part(config)
    most = max_positions(text)
    if context_length is not None and most is not None and context_length > most:
        name = f"{field.rpartition('.')[0]}.context_length".lstrip(".")
        raise ConfigError(
            name, context_length, f"{model} has {most} positions", f"Set it to at most {most}, or leave it out."
        )
    original = _before_long_factors(text)
    if original is None:
        return ServedContext(most if context_length is None else context_length)
    positions = original if context_length is None else context_length
    return ServedContext(positions, "long" if positions > original else "short")


def read_served_context(field: str, model: str, context_length: int | None) -> ServedContext:
    """The same, from a model directory; without any limit where its config.json cannot be read, which others report."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ServedContext(context_length)
    return served_context(field, model, config if isinstance(config, dict) else {}, context_length)


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def max_positions(text: Mapping[str, Any]) -> int | None:
    """The longest sequence that a model was made for; None if it does not say."""
    stated = [text[name] for name in POSITION_FIELDS if isinstance(text.get(name), int) and text[name] > 0]
    return min(stated, default=None)


def fix_long_factors(config: Mapping[str, Any]) -> None:
    """Give a configuration the long factors at every length, in place: its short factors become its long ones.

    Whatever reads it, transformers or vLLM, then computes the same frequencies in every pass.
    """
    text = text_part(config)
    for rope in _rope_parameters(text):
        if _is_longrope(rope, text):
            rope["short_factor"] = list(rope["long_factor"])
            if "long_mscale" in rope:
                rope["short_mscale"] = rope["long_mscale"]


def export_factors(directory: Path, context_length: int | None) -> None:
    """Write a job's long factors into the config.json of an exported model, which so behaves everywhere as trained.

    A model with short factors keeps its long ones, which the job never used.
    """
    if read_served_context("model", str(directory), context_length).factors == "long":
        path = directory / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        fix_long_factors(config)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _rope_parameters(text: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All sets of rotary parameters of a configuration; some models have one for each kind of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = text.get(name)
        if isinstance(rope, dict):
            nested = [part for part in rope.values() if isinstance(part, dict)]
            yield from nested or [rope]


def refuse_changing_frequencies_on_vllm(field: str, model: str, config: Mapping[str, Any]) -> None:
    """Refuse for vLLM what it computes otherwise than transformers: dynamic NTK scaling, which it applies to sequences
    of every length, where transformers leaves those within the model's positions as they are.

    Raises:
        ConfigError: the model has it.
    """
    for rope in _rope_parameters(text_part(config)):
        if _kind(rope) == "dynamic" and "alpha" not in rope:
            problem = "vLLM scales the dynamic rotary frequencies of its configuration for sequences of every length"
            remedy = "Set rollout.engine to transformers, or take rope_scaling out of its config.json."
            raise ConfigError(field, model, problem, remedy)


def _before_long_factors(text: Mapping[str, Any]) -> int | None:
    """The length up to which a longrope model has its short factors; None for other models."""
    for rope in _rope_parameters(text):
        if _is_longrope(rope, text):
            default = _PHI3_DEFAULT if text.get("model_type") == "phi3" else max_positions(text)
            stated = text.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
            return stated if isinstance(stated, int) else default
    return None


def _is_longrope(rope: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    # Early Phi-3 configurations call it yarn.
    kinds = (*_LONGROPE, "yarn") if text.get("model_type") == "phi3" else _LONGROPE
    return _kind(rope) in kinds and "long_factor" in rope


def _kind(rope: Mapping[str, Any]) -> object:
    return rope.get("rope_type") or rope.get("type")
