"""Checks before anything starts whether a task can work."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

from jackpot.config import TaskConfig
from jackpot.errors import ConfigError
from jackpot.orchestrator.tasks.jsonl import JsonlTask
from jackpot.orchestrator.tasks.protocol import Item, Task, finite_reward
from jackpot.orchestrator.tasks.registry import build_task


def validate_task(config: TaskConfig, seed: int) -> Task:
    """Build the task and probe it: both sides must have prompts, and the reward must return.

    Raises:
        ConfigError: the task is unknown, a parameter is bad, data is unreadable or empty, or a reward raises, does not
            return, or returns something other than a finite number. Names field, value and remedy.
    """
    task = build_task(config, seed)
    if task.num_prompts < 1:
        raise ConfigError("task.params", config.params, f"{config.name} has no prompts to train on", "Add prompts.")
    held_out = task.eval_items(1)
    if not held_out:
        raise ConfigError("task.params", config.params, f"{config.name} holds out no prompts", "Add prompts.")
    if isinstance(task, JsonlTask):
        task.load_grader()
    probe = task.train_prompt(0)
    for item in (probe, held_out[0]):
        _check_item(config, item)
    for completion in ("", str(probe.metadata.get("answer", "0"))):
        _probe_reward(config, task, probe, completion)
    return task


def _check_item(config: TaskConfig, item: Item) -> None:
    try:
        json.dumps(dict(item.metadata))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "task.name", config.name, f"the metadata of a prompt is not JSON ({error})", "Use JSON values only."
        ) from None
    if not item.prompt:
        raise ConfigError("task.name", config.name, "the first prompt is empty", "Give every item a prompt.")


def _probe_reward(config: TaskConfig, task: Task, item: Item, completion: str) -> None:
    outcome = within(config.reward_timeout_seconds, lambda: finite_reward(task.reward(item, completion)))
    if isinstance(outcome, Exception):
        raise ConfigError(
            "task.name",
            config.name,
            f"its reward fails on the completion {completion!r} ({type(outcome).__name__}: {outcome})",
            "Make it return a finite number for every completion.",
        ) from outcome


def within(seconds: float, call: Callable[[], object]) -> object:
    """What ``call`` returns or raises, or a TimeoutError. Its thread is a daemon: a hanging reward is left behind."""
    outcome: list[object] = [TimeoutError(f"no answer within {seconds:g} s")]

    def run() -> None:
        try:
            outcome[0] = call()
        except Exception as error:  # any error of foreign code is the result
            outcome[0] = error

    thread = threading.Thread(target=run, name="reward-probe", daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0]
