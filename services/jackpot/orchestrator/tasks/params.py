"""Reads a task's parameters; errors name the parameter."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from jackpot.errors import ConfigError

Value = TypeVar("Value", str, int, float)


def refuse_unknown(params: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise ConfigError for an unknown parameter, with the nearest known name."""
    names = sorted(known)
    for name, value in params.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            remedy = f"Did you mean {near[0]!r}?" if near else f"Known here: {', '.join(names)}."
            raise ConfigError(f"task.params.{name}", value, "unknown parameter of this task", remedy)


def read(params: Mapping[str, Any], name: str, kind: type[Value], default: Value | None = None) -> Value:
    """Parameter ``name`` as ``kind``; an int is accepted as a float.

    Raises:
        ConfigError: the parameter is missing and has no default, or is of another kind.
    """
    value = params.get(name, default)
    if value is None:
        raise ConfigError(f"task.params.{name}", None, "is required", f"Add {name} under task.params.")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"task.params.{name}", value, f"is not {_KINDS[kind]}", f"Give {_KINDS[kind]}.")
    return value


_KINDS: Mapping[type, str] = {str: "a string", int: "a whole number", float: "a number"}
