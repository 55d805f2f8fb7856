"""Tasks, which provide prompts and rewards."""

from jackpot.orchestrator.tasks.protocol import (
    Item,
    Message,
    Prompt,
    Task,
    TaskItem,
    UnreadableAnswer,
    finite_reward,
    prompt_key,
)
from jackpot.orchestrator.tasks.registry import build_task
from jackpot.orchestrator.tasks.validation import validate_task

__all__ = [
    "Item",
    "Message",
    "Prompt",
    "Task",
    "TaskItem",
    "UnreadableAnswer",
    "build_task",
    "finite_reward",
    "prompt_key",
    "validate_task",
]
