"""Causal language models at work: hidden states, output head, vocabulary, positions, device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from jackpot.algorithm.output_head import OutputHead
from jackpot.compute.varlen import attends_by_lengths, bounds
from jackpot.errors import ConfigError
from jackpot.storage.model_configuration import served_context
from jackpot.storage.model_files import read_json

SHARDED_FORWARD = "sharded_forward"
"""Attribute of a sharded model: the callable to use in place of its trunk."""

LONGEST = "longest_sequence"
"""Attribute of a model: tokens of the longest sequence that the job uses it on."""

VOCABULARY = "vocabulary_rows"
"""Attribute of a model whose output layer has padding: how many of its rows are token ids."""

# Architectures' names for a factor on their logits, and for a divisor.
_SCALE_FIELDS = ("logit_scale", "lm_head_multiplier")
_DIVISOR_FIELDS = ("logits_scaling",)

OTHER_ARCHITECTURE = "Use another architecture, such as Qwen3 or Llama."
"""What to do about one that cannot be served."""


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
        raise ConfigError("model", architecture(model), "has no linear output layer", OTHER_ARCHITECTURE)
    return layer


def architecture(model: PreTrainedModel) -> str:
    """transformers' name of the architecture; FSDP renames a sharded model's class."""
    return type(model).__name__.removeprefix("FSDP")


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens of the longest sequence that the job uses the model on; None if neither job nor model says."""
    own = getattr(model.config.get_text_config(), "max_position_embeddings", None) or None
    return getattr(model, LONGEST, own)
