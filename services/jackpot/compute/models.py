"""Causal language models in Hugging Face format: loading, hidden states, output head.

Every service loads its models here, so that sampling, scoring and training see the same numbers. Only safetensors are
read, and no code from a model directory is run.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from jackpot.algorithm.output_head import OutputHead
from jackpot.compute.model_weights import is_finite
from jackpot.compute.varlen import attends_by_lengths, bounds
from jackpot.errors import ConfigError
from jackpot.storage.model_configuration import fix_long_factors, served_context
from jackpot.storage.model_files import COMPLETE, not_finite, read_json
from jackpot.storage.model_support import check_model_directory

LOG = logging.getLogger(__name__)

SHARDED_FORWARD = "sharded_forward"
"""Attribute of a sharded model: the callable to use in place of its trunk."""

LONGEST = "longest_sequence"
"""Attribute of a model: tokens of the longest sequence that the job uses it on."""

VOCABULARY = "vocabulary_rows"
"""Attribute of a model whose output layer has padding: how many of its rows are token ids."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest |logit difference| accepted by the self-check, relative to the largest |logit|: rounding, no more.
_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
# The same for log-probabilities of one sequence in two passes of one shape.
_COMPANY_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
_COMPANY_TOKENS = 8
_TRIAL_TOKENS = 192
# Architectures' names for a factor on their logits, and for a divisor.
_SCALE_FIELDS = ("logit_scale", "lm_head_multiplier")
_DIVISOR_FIELDS = ("logits_scaling",)


def set_threads(num_threads: int) -> None:
    """Let torch use this many CPU threads in this process; 0 keeps torch's default."""
    if num_threads > 0:
        torch.set_num_threads(num_threads)


def resolve_device(text: str, *, field: str = "device") -> torch.device:
    """The device for ``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:<n>``.

    Raises:
        ConfigError: a CUDA device that this process cannot see. ``field`` names the setting in the message.
    """
    available = torch.cuda.is_available()
    if text == "auto":
        return torch.device("cuda" if available else "cpu")
    device = torch.device(text)
    if device.type == "cuda" and (not available or (device.index or 0) >= torch.cuda.device_count()):
        seen = torch.cuda.device_count() if available else 0
        raise ConfigError(
            field, text, f"this process sees {seen} CUDA devices", "Use auto or cpu, or check the driver."
        )
    return device


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


def hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    packed_lengths: Sequence[int] | None = None,
) -> Tensor:
    """Last hidden states after the final norm, ``[B, L, H]``, the input of :func:`output_head`.

    Rows may be padded on the right. Attention is causal, so real tokens never see that padding, and
    ``attention_mask`` ``[B, L]`` may be left out (which is faster); hidden states of padding are meaningless.

    Args:
        model: a model of :func:`load_causal_lm`.
        input_ids: ``[B, L]``.
        attention_mask: ``[B, L]``, 1 at real tokens; required for rows that are padded on the left. Or bool
            ``[B, 1, L, L]``: the tokens that each token sees, with SDPA or in a model that attends by lengths.
        position_ids: ``[B, L]``; None counts each row from 0.
        packed_lengths: tokens of the sequences that lie one after the other in the only row. A model that attends by
            lengths separates them by these; all others by ``position_ids``, which restart at 0 with each sequence.

    Raises:
        ValueError: a model that attends by lengths receives only positions, which do not separate sequences for it.
    """
    forward = getattr(model, SHARDED_FORWARD, model.base_model)
    packed_bounds: dict[str, Any] = {}
    if attends_by_lengths(model):
        if packed_lengths is not None:
            packed_bounds = bounds(packed_lengths, input_ids.device)
        elif position_ids is not None and attention_mask is None:
            raise ValueError("a model that attends by lengths needs packed_lengths or a mask beside position_ids")
    output = forward(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False, **packed_bounds
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def set_vocabulary(model: PreTrainedModel, vocabulary: int | None) -> None:
    """Let the first ``vocabulary`` rows of the output layer be the token ids. The others are padding, which
    :func:`output_head` leaves out: it has no probability and gets no gradient. None leaves all rows in."""
    if vocabulary is not None:
        setattr(model, VOCABULARY, vocabulary)


def set_longest(
    model: PreTrainedModel, model_dir: str | os.PathLike[str], field: str, context_length: int | None
) -> None:
    """Note how long the job's sequences may become, for the model's trials. Errors as :func:`read_configuration`."""
    path = Path(model_dir)
    positions = served_context(field, str(path), read_json(field, path / "config.json"), context_length).positions
    if positions is not None:
        setattr(model, LONGEST, positions)


def vocabulary_size(model: PreTrainedModel) -> int:
    """V, the number of token ids that have a probability. Errors as :func:`output_head`."""
    rows = _output_layer(model).weight.shape[0]
    return min(rows, getattr(model, VOCABULARY, rows))


def output_head(model: PreTrainedModel) -> OutputHead:
    """The model's map from hidden states to the logits of its vocabulary, without padding.

    Raises:
        ConfigError: the model has no linear output layer.
    """
    layer = _output_layer(model)
    config = model.config
    scale = 1.0
    for name in _SCALE_FIELDS:
        scale *= getattr(config, name, None) or 1.0
    for name in _DIVISOR_FIELDS:
        scale /= getattr(config, name, None) or 1.0
    weight: Tensor = layer.weight
    bias: Tensor | None = layer.bias
    if (vocabulary := vocabulary_size(model)) < weight.shape[0]:
        weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
    return OutputHead(weight, bias, getattr(config, "final_logit_softcapping", None), scale)


def _output_layer(model: PreTrainedModel) -> nn.Linear:
    layer = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(layer, nn.Linear):
        raise ConfigError("model", architecture(model), "has no linear output layer", _OTHER_ARCHITECTURE)
    return layer


def architecture(model: PreTrainedModel) -> str:
    """transformers' name of the architecture; FSDP renames a sharded model's class."""
    return type(model).__name__.removeprefix("FSDP")


@torch.no_grad()
def self_check(model: PreTrainedModel, *, field: str = "model") -> None:
    """Check that hidden states and output head reproduce the model's own logits, right padding included.

    For a sharded model all ranks must call it.

    Raises:
        ConfigError: they do not, or cannot be computed: scores and losses would belong to another model.
    """
    try:
        agrees = _reproduces_logits(model)
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        problem = f"its hidden states cannot be computed apart from its logits ({' '.join(str(error).split())[:200]})"
        raise ConfigError(field, architecture(model), problem, _OTHER_ARCHITECTURE) from error
    if not agrees:
        raise ConfigError(
            field,
            architecture(model),
            "its logits are not those of its last hidden states through its output layer",
            _OTHER_ARCHITECTURE,
        )


def _reproduces_logits(model: PreTrainedModel) -> bool:
    generator = torch.Generator().manual_seed(0)
    vocabulary = vocabulary_size(model)
    smaller = min(vocabulary, model.config.get_text_config().vocab_size)
    ids = torch.randint(smaller, (2, 8), generator=generator).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    expected = model(input_ids=ids[1:, :5], use_cache=False).logits[0, :, :vocabulary].float()
    # After a pass a sharded model's output layer has the compute dtype.
    bound = _CHECK_TOLERANCE[output_head(model).weight.dtype] * max(1.0, float(expected.abs().max()))
    for attention_mask in (mask, None):
        hidden = hidden_states(model, ids, attention_mask)
        logits = output_head(model).logits(hidden)[1, :5].float()
        # Written so that NaN fails as well.
        if logits.shape != expected.shape or not float((logits - expected).abs().max()) <= bound:
            return False
    return True


@torch.no_grad()
def check_company(model: PreTrainedModel, *, field: str = "model", longest: int | None = None) -> None:
    """Check that a sequence's log-probabilities do not depend on what else is in its pass, nor on the passes before.

    Some architectures scale all rotary embeddings of a pass by its greatest position (dynamic NTK, longrope): a short
    sequence then has other log-probabilities beside a long one, in engine, scorer and learner alike. A few tokens show
    it, since positions alone matter: a sequence of the first positions is passed beside itself, beside one that ends at
    the last position, and beside itself again. All passes have one shape, so that rounding is the same.

    For a sharded model all ranks must call it.

    Args:
        model: a model that passes :func:`self_check`.
        field: the setting that named the model.
        longest: tokens of the job's longest sequence; None is :func:`max_positions`.

    Raises:
        ConfigError: they do, with the difference.
    """
    positions = longest or max_positions(model)
    if positions is None or positions <= _COMPANY_TOKENS:
        return
    ids = torch.arange(_COMPANY_TOKENS, device=model.device) % vocabulary_size(model)
    first = torch.arange(_COMPANY_TOKENS, device=model.device)
    last = first + positions - _COMPANY_TOKENS
    try:
        logits = [_logits_beside(model, ids, first, other) for other in (first, last, first)]
    except (TypeError, ValueError):  # its layers take no positions, so that none of the pass can matter
        return
    reference = torch.log_softmax(logits[0], -1)
    difference = max(float((torch.log_softmax(other, -1) - reference).abs().max()) for other in logits[1:])
    greatest = max(1.0, float(logits[0].abs().max()))
    # Written so that NaN fails as well.
    if not difference <= _COMPANY_TOLERANCE[output_head(model).weight.dtype] * greatest:
        raise ConfigError(
            field,
            architecture(model),
            f"the log-probabilities of a sequence of {_COMPANY_TOKENS} tokens change by {difference:.2g} nats when one "
            f"of {positions} is in the same pass or in the one before it",
            "Give its config.json rotary embeddings that do not depend on the length, or use another model.",
        )


def _logits_beside(model: PreTrainedModel, ids: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Logits [L, V] of tokens at their ``own`` positions, in a pass with the same tokens at ``other`` positions."""
    hidden = hidden_states(model, torch.stack([ids, ids]), position_ids=torch.stack([own, other]))
    return output_head(model).logits(hidden)[0].float()


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens of the longest sequence that the job uses the model on; None if neither job nor model says."""
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None) or None
    return getattr(model, LONGEST, own)


def trial_length(model: PreTrainedModel) -> int:
    """Tokens of the longest sequence in a model's trials: as many as are cheap, and as the model has positions."""
    return min(_TRIAL_TOKENS, max_positions(model) or _TRIAL_TOKENS)


_OTHER_ARCHITECTURE = "Use another architecture, such as Qwen3 or Llama."


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
