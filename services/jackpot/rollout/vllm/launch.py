"""Configures and starts vLLM. Import this before torch, and call it before gRPC runs or threads compute."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jackpot.compute.common_vocabulary import vocabulary_rows
from jackpot.config import ActorConfig, ModelConfig, RolloutConfig
from jackpot.errors import ConfigError, EngineError
from jackpot.process.children import stop_with_parent
from jackpot.process.processor import has_cpu_build
from jackpot.storage.model_configuration import fix_long_factors, read_served_context
from jackpot.storage.model_files import check_numbers
from jackpot.storage.model_support import check_model_directory

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

    from jackpot.rollout.vllm.engine import VllmEngine
    from jackpot.rollout.vllm.stats import EngineCounts

LOG = logging.getLogger(__name__)

# Enough for a tiny model's 256 trajectories; on a GPU vLLM takes a fraction of its memory instead.
CPU_CACHE_BYTES = 256 << 20
CPU_STEP_TOKENS = 8192
_forking_engine = threading.local()


def prepare_environment(threads: int, on_cpu: bool) -> None:
    """Set vLLM's environment variables, except those that the user has set. Call it before torch is imported."""
    settings = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_CONFIGURE_LOGGING": "0",  # its records go to our handlers
        "HF_HUB_OFFLINE": "1",  # models are directories
    }
    if on_cpu:
        settings |= {
            "OMP_NUM_THREADS": str(max(1, threads)),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker in the engine's process: one process less
            "TORCHDYNAMO_DISABLE": "1",  # spares ten seconds of compilation at the first request
        }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def is_cpu_build() -> bool:
    """Whether the installed vLLM is its CPU build; checked without importing it."""
    return has_cpu_build() or "cpu" in importlib.metadata.version("vllm")


def create_vllm_engine(
    config: ModelConfig,
    rollout: RolloutConfig,
    threads: int,
    *,
    field: str,
    on_tokens: Callable[[int], object],
    vocabulary: int | None = None,
) -> VllmEngine:
    """The engine, complete except for weights from the store.

    Args:
        config: the model.
        rollout: the engine's settings.
        threads: CPU threads of the CPU build.
        field: the setting that names the model, for error messages.
        on_tokens: receives the number of tokens sampled.
        vocabulary: V, where the model's rows beyond it are padding.

    Raises:
        ConfigError: the model, the device or a setting cannot work.
        EngineError: vLLM did not start.
    """
    on_cpu = is_cpu_build()
    if rollout.device != "auto" and on_cpu != (rollout.device == "cpu"):
        build = "CPU" if on_cpu else "GPU"
        raise ConfigError("rollout.device", rollout.device, f"this is vLLM's {build} build", "Use auto.")
    check_model_directory(field, config.model, "vllm")
    check_numbers(field, Path(config.model))
    prepare_environment(threads, on_cpu)
    from jackpot.rollout.vllm.engine import VllmEngine
    from jackpot.rollout.vllm.stats import EngineCounts

    counts = EngineCounts(on_tokens)
    llm = start_vllm(config, rollout, counts, on_cpu=on_cpu, field=field, vocabulary=vocabulary)
    return VllmEngine(llm, counts, eos_ids=eos_token_ids(Path(config.model)), max_queue=rollout.max_queue)


def start_vllm(
    config: ModelConfig,
    rollout: RolloutConfig,
    counts: EngineCounts,
    *,
    on_cpu: bool,
    extension: str | None = None,
    field: str = "actor.model",
    vocabulary: int | None = None,
) -> AsyncLLM:
    """Start vLLM's engine process and load the model. Takes many seconds.

    Args:
        config: the model; an actor's number formats are taken into account.
        rollout: batch size and vLLM's own settings.
        counts: receives the scheduler's statistics.
        on_cpu: whether this is the CPU build.
        extension: the worker extension; None is ours.
        field: the setting that names the model, for error messages.
        vocabulary: V, where the model's rows beyond it are padding.

    Raises:
        ConfigError: vLLM refuses the model or a setting.
        EngineError: its process ended during the start.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from jackpot.rollout.vllm.worker import EXTENSION

    started = time.monotonic()
    arguments = engine_arguments(config, rollout, on_cpu=on_cpu, field=field)
    if vocabulary is not None and vocabulary < vocabulary_rows("model", config.model):
        from jackpot.rollout.vllm.vocabulary import SETTING

        arguments["additional_config"] = {SETTING: vocabulary}
    try:
        vllm_config = AsyncEngineArgs(**arguments, worker_extension_cls=extension or EXTENSION).create_engine_config()
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        raise ConfigError("rollout.vllm", config.model, f"vLLM refuses it ({_brief(error)})", _REMEDY) from error
    if on_cpu:
        # Modules are imported already: a forked process starts many seconds earlier. vLLM has just set `spawn`.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    _forking_engine.now = True
    try:
        llm = AsyncLLM.from_vllm_config(vllm_config, stat_loggers=[counts.logger])
    except (RuntimeError, ValueError, OSError) as error:
        raise EngineError(f"vLLM did not start ({_brief(error)}). See its own log lines above.") from error
    finally:
        _forking_engine.now = False
    LOG.info("vLLM started", extra={"seconds": time.monotonic() - started, "model": config.model})
    return llm


def engine_arguments(
    config: ModelConfig, rollout: RolloutConfig, *, on_cpu: bool, field: str = "actor.model"
) -> dict[str, Any]:
    """The arguments of ``AsyncEngineArgs``.

    Raises:
        ConfigError: the CPU build does not support a setting, or the model not the context.
    """
    from vllm.config import WeightTransferConfig

    from jackpot.rollout.vllm.worker import BACKEND

    settings = rollout.vllm
    context = read_served_context(field, config.model, config.context_length)
    arguments: dict[str, Any] = {
        "model": config.model,
        "dtype": config.dtype,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "trust_remote_code": False,
        "load_format": "safetensors",
        "max_model_len": min(filter(None, (settings.max_model_len, context.positions)), default=None),
        "max_num_seqs": rollout.max_batch_size,
        "max_logprobs": -1,
        "logprobs_mode": "processed_logprobs",  # of the distribution actually sampled from
        "scheduling_policy": "priority",
        "enable_prefix_caching": True,
        "enforce_eager": on_cpu or settings.eager,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "data_parallel_size": settings.data_parallel_size,
        "kv_cache_memory_bytes": settings.kv_cache_bytes or (CPU_CACHE_BYTES if on_cpu else None),
        "gpu_memory_utilization": settings.gpu_memory_fraction,
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
        "enable_lora": False,
        "seed": 0,
    }
    if context.factors == "long":
        # By itself vLLM takes the long factors where max_model_len, which may be set apart, is beyond the short ones'.
        arguments["hf_overrides"] = with_long_factors
    if isinstance(config, ActorConfig):
        arguments["quantization"] = config.quantization
        arguments["kv_cache_dtype"] = config.kv_cache_dtype
    if on_cpu:
        # A seeded request whose prompt is split over steps ends vLLM's engine on CPU ("CPU Generator does not use
        # offset"): prompts are never split, so that the longest must fit into one step.
        longest = arguments["max_model_len"] or 0
        arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(longest, CPU_STEP_TOKENS)}
        if settings.tensor_parallel_size * settings.data_parallel_size == 1:
            arguments["distributed_executor_backend"] = "uni"
    return arguments


def with_long_factors(hf_config: Any) -> Any:
    """vLLM's configuration of a longrope model, with its long factors at every length."""
    fix_long_factors(vars(hf_config.get_text_config()))
    return hf_config


def eos_token_ids(model_dir: Path) -> tuple[int, ...]:
    """The tokens that end a completion, from generation_config.json or else config.json."""
    for name in ("generation_config.json", "config.json"):
        try:
            ids = json.loads((model_dir / name).read_text(encoding="utf-8")).get("eos_token_id")
        except FileNotFoundError:
            continue
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (int(ids),)
    return ()


_REMEDY = "Check actor.dtype, actor.quantization, actor.kv_cache_dtype and rollout.vllm, or use engine transformers."


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _in_forked_engine() -> None:
    """In vLLM's process: detach from our event loop's signals, and die with us, even if we are killed."""
    if getattr(_forking_engine, "now", False):
        signal.set_wakeup_fd(-1)
        stop_with_parent(signal.SIGKILL)


_register: Callable[..., None] | None = getattr(os, "register_at_fork", None)
if _register is not None:
    _register(after_in_child=_in_forked_engine)
