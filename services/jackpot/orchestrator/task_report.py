"""`jackpot validate`'s report on a task: the prompts that are used, and the rewards of known answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from jackpot.config import JobSpec
from jackpot.orchestrator.preflight import CheckedTask
from jackpot.orchestrator.prompts import held_out
from jackpot.orchestrator.tasks import Item, Task, finite_reward, prompt_key
from jackpot.orchestrator.tasks.answers import final_answer
from jackpot.orchestrator.tasks.validation import within

GRADED_PROMPTS = 8
COMPARED_PROMPTS = 2000  # training prompts to search for held-out ones
COMPARING_SECONDS = 2.0  # some tasks need a second per prompt
NAMED = 3
RIGHT = 1 - 1e-6

_WRONG = (
    "I do not know.",
    "-",
    "0",
    "1",
    "-7",
    "123456789",
    "\\boxed{}",
    "The answer is",
    "\\boxed{\\text{none}}",
    "yes",
    "x",
    "None",
)


@dataclass(frozen=True, slots=True)
class Grades:
    """Mean rewards of completions of one kind."""

    kind: str
    rewards: Sequence[float]
    failures: Sequence[str]  # for rewards that raised or did not return

    def line(self) -> str:
        """One line for humans."""
        num = len(self.rewards) + len(self.failures)
        right = sum(reward >= RIGHT for reward in self.rewards)
        mean = f"{sum(self.rewards) / len(self.rewards):.2f} on average" if self.rewards else "no reward"
        failed = f", {len(self.failures)} failed: {self.failures[0]}" if self.failures else ""
        return f"{self.kind:<24} {mean}, {right} of {num} earn 1{failed}"


def report_task(job: JobSpec, checked: CheckedTask) -> list[str]:
    """Lines about the prompts and the reward of a job.

    Args:
        job: the job, its models resolved to directories.
        checked: what :func:`validate_job` found of it.
    """
    return [*_prompt_lines(job, checked), *_reward_lines(job, checked.task)]


def _prompt_lines(job: JobSpec, checked: CheckedTask) -> list[str]:
    task, survey = checked.task, checked.survey
    of_all = "" if survey.num_prompts == task.num_prompts else f" looked at, from all over the {task.num_prompts},"
    used = survey.num_prompts - len(survey.unusable)
    lines = [f"training prompts         {used} of {survey.num_prompts}{of_all} can be used"]
    lines += _left_out(survey.unusable)
    items = task.eval_items(job.evaluation.prompts)
    asked = held_out(items, checked.encoder)
    lines.append(f"held-out prompts         {len(asked.items)} of {len(items)} are asked")
    lines += _left_out(asked.left_out)
    shared, compared = _trained_on(task, asked.items)
    if shared:
        among = "" if compared == task.num_prompts else f" (of the first {compared})"
        lines.append(f"warning: {shared} held-out prompts are training prompts{among}, too: the accuracy flatters")
    return lines


def _left_out(reasons: Sequence[str]) -> list[str]:
    shown = [f"  left out: {reason}" for reason in reasons[:NAMED]]
    return [*shown, f"  and {len(reasons) - NAMED} more"] if len(reasons) > NAMED else shown


def _trained_on(task: Task, held: Sequence[Item]) -> tuple[int, int]:
    """How many held-out prompts are training prompts, and of how many of these."""
    keys = {prompt_key(item.prompt) for item in held}
    trained_keys: set[str] = set()
    count, compared, began = min(task.num_prompts, COMPARED_PROMPTS), 0, time.monotonic()
    while compared < count and time.monotonic() - began < COMPARING_SECONDS:
        trained_keys.update({prompt_key(task.train_prompt(compared).prompt)} & keys)
        compared += 1
    return len(trained_keys), compared


def _reward_lines(job: JobSpec, task: Task) -> list[str]:
    items = [task.train_prompt(index) for index in range(min(task.num_prompts, GRADED_PROMPTS))]
    answers = [final_answer(str(item.metadata["answer"])) if "answer" in item.metadata else None for item in items]
    known = [(item, answer) for item, answer in zip(items, answers, strict=True) if answer is not None]
    plain = _grade(job, task, "the right answer", [(item, answer) for item, answer in known])
    boxed = _grade(job, task, "the right answer, boxed", [(item, f"$\\boxed{{{answer}}}$") for item, answer in known])
    empty = _grade(job, task, "an empty text", [(item, "") for item in items])
    others = [[*_WRONG, *(answer for _, answer in known)] for _ in items]
    wrong = _grade(
        job,
        task,
        "wrong texts",
        [
            (item, text)
            for item, answer, texts in zip(items, answers, others, strict=True)
            for text in dict.fromkeys(texts)
            if text != answer
        ],
    )
    graded = [grades for grades in (plain, boxed, empty, wrong) if grades.rewards or grades.failures]
    return [*(grades.line() for grades in graded), *_warnings(job, plain, boxed, empty)]


def _warnings(job: JobSpec, plain: Grades, boxed: Grades, empty: Grades) -> list[str]:
    lines = []
    if plain.rewards and max(plain.rewards) < RIGHT:
        lines.append("warning: no right answer earns 1: look at answer_key, answer_tag and reward")
    elif plain.rewards and boxed.rewards and max(boxed.rewards) < RIGHT and job.task.name == "jsonl":
        lines.append("note: a boxed answer earns nothing; task.params.reward=math_verify reads boxes and phrases")
    if empty.rewards and max(empty.rewards) >= RIGHT:
        lines.append("warning: an empty text earns 1")
    return lines


def _grade(job: JobSpec, task: Task, kind: str, pairs: Sequence[tuple[Item, str]]) -> Grades:
    tag = job.task.params.get("answer_tag")
    rewards, failures = [], []
    for item, text in pairs:
        completion = f"<{tag}>{text}</{tag}>" if tag and text else text
        outcome = within(job.task.reward_timeout_seconds, partial(_reward, task, item, completion))
        if isinstance(outcome, float):
            rewards.append(outcome)
        else:
            failures.append(f"{type(outcome).__name__}: {outcome}")
    return Grades(kind, rewards, failures)


def _reward(task: Task, item: Item, completion: str) -> float:
    return finite_reward(task.reward(item, completion))
