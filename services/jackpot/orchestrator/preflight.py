"""What a launcher asks before it starts any process: can this job's task, tokenizer and budget work?"""

from __future__ import annotations

from jackpot.config import JobSpec
from jackpot.errors import ConfigError
from jackpot.orchestrator.dispatch import largest_group_bytes
from jackpot.orchestrator.tasks import validate_task
from jackpot.orchestrator.tokenizer import PromptTokenizer


def validate_job(job: JobSpec) -> None:
    """Check what the orchestrator of this job will depend on, by using it.

    Args:
        job: the job, its models resolved to directories.

    Raises:
        ConfigError: naming field, value and remedy.
    """
    task = validate_task(job.task, job.seed)
    tokenizer = PromptTokenizer.of_job(job)
    tokenizer.stop_token_ids(job.sampling.stop)
    for item in (task.train_prompt(0), *task.eval_items(1)):
        tokenizer.encode_prompt(item.prompt)
    if (needed := largest_group_bytes(job)) > job.bus.max_bytes:
        raise ConfigError(
            "bus.max_bytes",
            job.bus.max_bytes,
            f"one group may take {needed} bytes",
            "Raise it, or lower sampling.max_tokens, sampling.group_size or rollout.top_logprobs.",
        )
