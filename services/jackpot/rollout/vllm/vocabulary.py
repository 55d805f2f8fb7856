"""Padding of the vocabulary, which vLLM's own models do not know of: cut off where vLLM cuts off its own."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor

SETTING = "jackpot_vocabulary"
"""Key of vLLM's additional configuration: V, where rows of the output layer beyond it are padding."""


def cut_padding(model: nn.Module, additional_config: Any) -> None:
    """Let a model's logits end at V, so that padding is never sampled and has no share in any log-probability.

    vLLM pads the output layer itself, to whole blocks of rows, and drops these columns before it samples. With a
    smaller V it drops the checkpoint's padding with them, at no cost.

    Raises:
        RuntimeError: the architecture computes its logits in another way.
    """
    vocabulary = additional_config.get(SETTING) if isinstance(additional_config, dict) else None
    if vocabulary is None:
        return
    processors = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    if not processors:
        raise RuntimeError(f"{type(model).__name__} does not let its vocabulary be cut to {vocabulary} tokens")
    for processor in processors:
        processor.org_vocab_size = min(processor.org_vocab_size, vocabulary)
