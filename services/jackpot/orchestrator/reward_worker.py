"""A process that computes rewards for its parent, which can end it if a reward hangs or crashes.

The two exchange JSON lines on stdin and stdout. The first line holds the task; the answer is ``{"ready": true}``. Each
further line holds a group; the answer is one line per completion: ``{"reward": …}``, with ``"unreadable": why`` if the
grader cannot read the completion, or ``{"error": …}``. The process ends with its input.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, TextIO

from jackpot.config import TaskConfig
from jackpot.errors import ConfigError
from jackpot.orchestrator.tasks import Task, TaskItem, UnreadableAnswer, build_task, finite_reward
from jackpot.orchestrator.tasks.jsonl import JsonlTask
from jackpot.process.children import stop_with_parent


def main() -> int:
    """Serve until the input ends; 2 if the task cannot be built."""
    stop_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the orchestrator, which ends this process
    answers = _private_stdout()
    first = json.loads(sys.stdin.readline())
    try:
        task = build_task(TaskConfig.model_validate(first["task"]), first["seed"])
    except ConfigError as error:
        _answer(answers, {"error": str(error)})
        return error.exit_code
    if isinstance(task, JsonlTask):
        task.load_grader()
    _answer(answers, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        item = TaskItem(request["prompt"], request["metadata"])
        for completion in request["completions"]:
            _answer(answers, _reward(task, item, completion))
    return 0


def _reward(task: Task, item: TaskItem, completion: str) -> dict[str, Any]:
    try:
        reward = task.reward(item, completion)
        if isinstance(reward, UnreadableAnswer):
            return {"reward": 0.0, "unreadable": reward.reason}
        return {"reward": finite_reward(reward)}
    except Exception as error:  # foreign code: any error is reported and fails only this reward
        return {"error": f"{type(error).__name__}: {error}"}


def _answer(answers: TextIO, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def _private_stdout() -> TextIO:
    """The pipe to the parent. The task's own prints go to stderr instead."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    sys.exit(main())
