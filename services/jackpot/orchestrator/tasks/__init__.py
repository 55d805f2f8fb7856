"""Tasks: where prompts and rewards come from."""

from jackpot.orchestrator.tasks.protocol import Item, Message, Prompt, Task, TaskItem, finite_reward
from jackpot.orchestrator.tasks.registry import build_task
from jackpot.orchestrator.tasks.validation import validate_task

__all__ = ["Item", "Message", "Prompt", "Task", "TaskItem", "build_task", "finite_reward", "validate_task"]
