"""From settings to a trainer: joins the ranks, sets seeds, loads models in their training dtype."""

from __future__ import annotations

import logging
import random

import numpy as np
import torch
from transformers import PreTrainedModel

from jackpot.compute.common_vocabulary import common_vocabulary
from jackpot.compute.model_loading import load_causal_lm
from jackpot.compute.models import resolve_device, set_threads
from jackpot.compute.ranks.group import SOLO, Ranks, join_ranks
from jackpot.compute.ranks.loading import load_on_ranks
from jackpot.config import JobSpec, ModelConfig
from jackpot.config.environment import ServiceEnvironment
from jackpot.errors import ConfigError
from jackpot.learner.models.compile_and_checkpoint import require_compiler
from jackpot.learner.reports.profiling import StepProfiler
from jackpot.learner.trainer import Trainer
from jackpot.storage.run_directory import RunFiles

LOG = logging.getLogger(__name__)


def build_trainer(environment: ServiceEnvironment, job: JobSpec) -> tuple[Trainer, Ranks]:
    """This process's trainer and its ranks.

    One process trains whole, plain models; several use FSDP, and so does one that offloads to the CPU.

    Raises:
        ConfigError: a model, a device or the number of ranks cannot work.
    """
    processes = job.learner.processes
    set_threads(max(1, environment.threads // processes) if environment.threads else 0)
    seed_everything(job.seed)
    device = resolve_device(job.learner.device, field="learner.device")
    if job.learner.cpu_offload and device.type != "cuda":
        raise ConfigError("learner.cpu_offload", True, "there is no GPU to bring parameters to", "Set it to false.")
    if job.scorer.reuse_reference:
        LOG.warning(
            "scorer.reuse_reference: PPO's clip never acts, learner.lr alone bounds a step; see docs/training.md"
        )
    if job.learner.compile:
        require_compiler(device)
    ranks = join_ranks("learner", job.learner, device) if is_sharded(job) else SOLO
    # Offloaded parameters must not pass through GPU memory first.
    place = torch.device("cpu") if job.learner.cpu_offload else ranks.device or device
    vocabulary = common_vocabulary(job)
    policy = _load_learning(job.policy, place, ranks, vocabulary, field="policy.model")
    actor = None
    if not isinstance(job.actor, str) and job.actor.weights == "own":
        if job.actor.train:
            actor = _load_learning(job.actor, place, ranks, vocabulary, field="actor.model")
        elif ranks.rank == 0:
            published_from = device if ranks.mesh is None else torch.device("cpu")
            actor = load_causal_lm(
                job.actor.model,
                job.actor.dtype,
                published_from,
                field="actor.model",
                context_length=job.actor.context_length,
                vocabulary=vocabulary,
            )
    profiler = StepProfiler(RunFiles(environment.run_dir).profile, job.learner.profile_steps, ranks.rank)
    return Trainer(job, policy, actor, ranks, profiler), ranks


def is_sharded(job: JobSpec) -> bool:
    """Whether the job's models use FSDP: several processes, or parameters on the CPU."""
    return job.learner.processes > 1 or job.learner.cpu_offload


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and Python. Training draws no random numbers today; any that a model draws are repeatable."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _load_learning(
    model: ModelConfig, device: torch.device, ranks: Ranks, vocabulary: int, *, field: str
) -> PreTrainedModel:
    if ranks.mesh is None:
        return load_causal_lm(
            model.model,
            "float32",
            device,
            field=field,
            context_length=model.context_length,
            vocabulary=vocabulary,
        )
    return load_on_ranks(
        model.model,
        "float32",
        ranks,
        device,
        field=field,
        context_length=model.context_length,
        vocabulary=vocabulary,
    )
