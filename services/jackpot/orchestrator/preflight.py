"""What a launcher asks before it starts any process: can this job's task, tokenizer and budget work?"""

from __future__ import annotations

import json
from pathlib import Path

from jackpot.config import JobSpec
from jackpot.errors import ConfigError
from jackpot.orchestrator.deferral import Deferral
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
    prompts = [tokenizer.encode_prompt(item.prompt) for item in (task.train_prompt(0), *task.eval_items(1))]
    if job.scorer.reuse_reference:
        Deferral(job)
    _check_lengths(job, max(len(prompt) for prompt in prompts))
    if (needed := largest_group_bytes(job)) > job.bus.max_bytes:
        raise ConfigError(
            "bus.max_bytes",
            job.bus.max_bytes,
            f"one group may take {needed} bytes",
            "Raise it, or lower sampling.max_tokens, sampling.group_size or rollout.top_logprobs.",
        )


def _check_lengths(job: JobSpec, prompt_tokens: int) -> None:
    """A prompt and the longest completion fit into both models.

    Every engine refuses what does not fit, so that such a job would drop every group.
    """
    models = {"policy.model": job.policy.model} | ({} if job.on_policy else {"actor.model": job.rollout_model.model})
    limits = {field: _max_positions(Path(model)) for field, model in models.items()}
    if job.rollout.engine == "vllm":
        limits["rollout.vllm.max_model_len"] = job.rollout.vllm.max_model_len
    for field, limit in limits.items():
        if limit is not None and prompt_tokens + job.sampling.max_tokens > limit:
            raise ConfigError(
                "sampling.max_tokens",
                job.sampling.max_tokens,
                f"with a prompt of {prompt_tokens} tokens it exceeds the {limit} positions of {field}",
                f"Set it to at most {limit - prompt_tokens}."
                if limit > prompt_tokens
                else "Use shorter prompts, or a model with a longer context.",
            )


def _max_positions(model_dir: Path) -> int | None:
    """The longest sequence that a model was made for; None if it does not say."""
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # whether a model directory is whole is checked elsewhere
    text = config.get("text_config")
    positions = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return positions if isinstance(positions, int) and positions > 0 else None
