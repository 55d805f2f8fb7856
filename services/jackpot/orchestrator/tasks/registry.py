"""Builds the task that a job's ``task`` section names."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

from jackpot.config import TaskConfig
from jackpot.errors import ConfigError
from jackpot.orchestrator.tasks.jsonl import JsonlTask
from jackpot.orchestrator.tasks.procedural import ReasoningGymTask
from jackpot.orchestrator.tasks.protocol import Task

ENTRY_POINT_GROUP = "jackpot.tasks"


def build_task(config: TaskConfig, seed: int) -> Task:
    """The job's task, with its parameters checked and its data read.

    Raises:
        ConfigError: the task is unknown, a parameter is bad, or data cannot be read.
    """
    kind, _, rest = config.name.partition(":")
    if kind == "reasoning_gym" and rest:
        return ReasoningGymTask(rest, config.params, seed)
    if config.name == "jsonl":
        return JsonlTask(config.params, seed)
    factory = _python_attribute(config.name) if kind == "python" else _installed(config.name)
    return _construct(factory, config, seed)


def _construct(factory: Any, config: TaskConfig, seed: int) -> Task:
    try:
        task = factory(config.params, seed)
    except (TypeError, ValueError, KeyError) as error:  # a constructor's errors for bad arguments
        raise ConfigError(
            "task.params",
            config.params,
            f"refused by {config.name} ({type(error).__name__}: {error})",
            "Correct the parameters; a task is built as factory(params, seed).",
        ) from error
    if not isinstance(task, Task):
        raise ConfigError(
            "task.name",
            config.name,
            "does not build a task",
            "It needs num_prompts, train_prompt(), eval_items() and reward().",
        )
    return task


def _installed(name: str) -> Callable[..., Any]:
    entry_points = {entry.name: entry for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
    if name not in entry_points:
        known = [*sorted(entry_points), "jsonl", "reasoning_gym:<dataset>", "python:<module>:<attribute>"]
        near = difflib.get_close_matches(name, known, n=3)
        remedy = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Known: {', '.join(known)}."
        raise ConfigError("task.name", name, "unknown task", remedy)
    return _load(name, entry_points[name].module, entry_points[name].attr)


def _python_attribute(name: str) -> Callable[..., Any]:
    _, module, attribute = (*name.split(":", 2), "", "")[:3]
    if not module or not attribute:
        raise ConfigError("task.name", name, "is not of the form python:<module>:<attribute>", "Name both.")
    return _load(name, module, attribute)


def _load(name: str, module: str, attribute: str) -> Callable[..., Any]:
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError("task.name", name, f"cannot be imported ({error})", "Install its package.") from error
    if not callable(factory):
        raise ConfigError("task.name", name, f"{attribute} is not callable", "Name a class or a function.")
    return factory  # type: ignore[no-any-return]
