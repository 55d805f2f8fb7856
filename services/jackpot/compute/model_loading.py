"""Loads causal language models from directories in Hugging Face format.

Every service loads its models here, so that sampling, scoring and training see the same numbers. Only safetensors are
read, and no code from a model directory is run.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from jackpot.compute.model_checks import check_company, self_check
from jackpot.compute.model_weights import is_finite
from jackpot.compute.models import set_longest, set_vocabulary
from jackpot.errors import ConfigError
from jackpot.storage.model_configuration import fix_long_factors, served_context
from jackpot.storage.model_files import COMPLETE, not_finite, read_json
from jackpot.storage.model_support import check_model_directory

LOG = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_causal_lm(
    model_dir: str | os.PathLike[str],
    dtype: str,
    device: torch.device | str,
    *,
    field: str = "model",
    context_length: int | None = None,
    vocabulary: int | None = None,
) -> PreTrainedModel:
    """Load a model in eval mode, checked by :func:`self_check`. Attention is SDPA where the architecture has it.

    Args:
        model_dir: a directory with config.json and \\*.safetensors.
        dtype: number format of the weights: ``float32``, ``bfloat16`` or ``float16``.
        device: where to put it.
        field: the setting that named the directory, for error messages.
        context_length: the job's longest sequence, see :func:`read_configuration`.
        vocabulary: V; rows of the output layer beyond it are padding, see :func:`set_vocabulary`. None: there are none.

    Raises:
        ConfigError: the directory is missing or incomplete, or the architecture is not supported.
    """
    model = read_causal_lm(model_dir, dtype, field=field, context_length=context_length)
    set_vocabulary(model, vocabulary)
    set_longest(model, model_dir, field, context_length)
    model.to(torch.device(device))  # type: ignore[arg-type] # transformers decorates `to`
    self_check(model, field=field)
    check_company(model, field=field)
    return model


def read_causal_lm(
    model_dir: str | os.PathLike[str], dtype: str, *, field: str = "model", context_length: int | None = None
) -> PreTrainedModel:
    """Read a model into the CPU's memory, in eval mode, unchecked. Arguments and errors as :func:`load_causal_lm`."""
    path = Path(model_dir)
    check_model_directory(field, str(path), None)
    configuration = read_configuration(path, field=field, context_length=context_length)
    with quiet():
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=configuration,
                dtype=_DTYPES[dtype],
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                attn_implementation=attention_of(configuration),
            )
        except (OSError, ValueError, RuntimeError, KeyError, safetensors.SafetensorError) as error:
            raise _cannot_be_loaded(field, path, error) from None
    model: PreTrainedModel = loaded[0]
    # From a directory with transformers' own names nothing was converted, and versions would repeat those names.
    loaded[0]._weight_conversions = loaded[0]._weight_conversions or None
    report: Mapping[str, set[str]] = loaded[1]
    if report["missing_keys"]:
        names = ", ".join(sorted(report["missing_keys"])[:5])
        raise ConfigError(field, str(path), f"lacks {len(report['missing_keys'])} tensors ({names})", COMPLETE)
    if report["unexpected_keys"]:
        LOG.warning("%s holds tensors that its architecture does not use: %s", path, sorted(report["unexpected_keys"]))
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.detach()):
            raise not_finite(field, str(path), name)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def read_configuration(path: Path, *, field: str = "model", context_length: int | None = None) -> PreTrainedConfig:
    """A model's configuration as a job uses it.

    If the job's sequences outgrow the short factors of a longrope model, it has the long ones at every length: see
    :mod:`jackpot.storage.model_configuration`.

    Args:
        path: the model directory.
        field: the setting that named it.
        context_length: the job's longest sequence; None is that of the model, or of its short factors.

    Raises:
        ConfigError: it cannot be read, or the model cannot serve such sequences.
    """
    context = served_context(field, str(path), read_json(field, path / "config.json"), context_length)
    with quiet():
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _cannot_be_loaded(field, path, error) from None
    if context.factors == "long":
        fix_long_factors(vars(config.get_text_config()))
    return config


def attention_of(config: PreTrainedConfig) -> str | None:
    """The attention that a configuration requires; None leaves the choice to transformers.

    SDPA does not know the soft cap of attention scores (Gemma-2), and transformers before 5.20 chooses it all the same.
    """
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None else None


def _cannot_be_loaded(field: str, path: Path, error: Exception) -> ConfigError:
    problem = f"cannot be loaded ({' '.join(str(error).split())[:300]})"
    return ConfigError(field, str(path), problem, "Use a causal language model of transformers.")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' progress bars and load reports; we check and raise what matters in them."""
    log: Any = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
