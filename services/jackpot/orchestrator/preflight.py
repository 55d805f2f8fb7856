"""Checks that a launcher makes before it starts any process: whether task, tokenizer and budget can work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from jackpot.config import JobSpec
from jackpot.errors import ConfigError, PromptError
from jackpot.orchestrator.deferral import Deferral
from jackpot.orchestrator.dispatch import largest_group_bytes
from jackpot.orchestrator.prompts import PromptEncoder, held_out
from jackpot.orchestrator.tasks import Task, validate_task
from jackpot.orchestrator.tokenizer import PromptTokenizer

SURVEYED_PROMPTS = 1000
SURVEY_SECONDS = 2.0  # some tasks need a second per prompt
SURVEYED_HELD_OUT = 8


@dataclass(frozen=True, slots=True)
class PromptSurvey:
    """The training prompts that were checked."""

    num_prompts: int
    unusable: Sequence[str]  # why, for each prompt that no engine accepts


@dataclass(frozen=True, slots=True)
class CheckedTask:
    """A job's task that passed the checks, with what they built and found."""

    task: Task
    encoder: PromptEncoder
    survey: PromptSurvey


def validate_job(job: JobSpec) -> CheckedTask:
    """Check what the job's orchestrator will depend on, by using it.

    Args:
        job: the job, its models resolved to directories.

    Returns:
        The task that was built for it.

    Raises:
        ConfigError: naming field, value and remedy.
    """
    task = validate_task(job.task, job.seed)
    tokenizer = PromptTokenizer.of_job(job)
    tokenizer.stop_token_ids(job.sampling.stop)
    encoder = PromptEncoder.of_job(job, tokenizer)
    survey = survey_prompts(task, encoder)
    try:
        held_out(task.eval_items(min(job.evaluation.prompts, SURVEYED_HELD_OUT)), encoder)
    except ConfigError:
        held_out(task.eval_items(job.evaluation.prompts), encoder)
    if job.scorer.reuse_reference:
        Deferral(job)
    if (needed := largest_group_bytes(job)) > job.bus.max_bytes:
        raise ConfigError(
            "bus.max_bytes",
            job.bus.max_bytes,
            f"one group may take {needed} bytes",
            "Raise it, or lower sampling.max_tokens, sampling.group_size or rollout.top_logprobs.",
        )
    return CheckedTask(task, encoder, survey)


def survey_prompts(task: Task, encoder: PromptEncoder) -> PromptSurvey:
    """Encode training prompts evenly spread over the epoch, as many as fit in a moment.

    Raises:
        ConfigError: no prompt can be used, or the chat template refuses one.
    """
    count = min(task.num_prompts, SURVEYED_PROMPTS)
    began, looked, unusable = time.monotonic(), 0, []
    for index in range(count):
        item = task.train_prompt(index * task.num_prompts // count)
        try:
            encoder.encode(item)
        except PromptError as error:
            unusable.append(str(error))
        looked += 1
        patience = SURVEY_SECONDS if looked > len(unusable) else 10 * SURVEY_SECONDS
        if time.monotonic() - began > patience:
            break
    if looked == len(unusable):
        raise ConfigError(
            "sampling.max_tokens",
            encoder.max_tokens,
            f"no training prompt can be used: {unusable[0]}",
            _remedy(encoder, task),
        )
    return PromptSurvey(looked, unusable)


def _remedy(encoder: PromptEncoder, task: Task) -> str:
    try:
        room = (encoder.limit or 0) - len(encoder.tokenizer.encode_prompt(task.train_prompt(0).prompt))
    except PromptError:
        room = 0
    return f"Set it to at most {room}." if room > 0 else "Use shorter prompts, or a model with a longer context."
