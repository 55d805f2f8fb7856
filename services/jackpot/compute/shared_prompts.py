"""Whether a model's rows can hold several completions after one prompt, and when that is less work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from jackpot.compute.batching import AttentionCost
from jackpot.compute.forward import completion_hidden
from jackpot.compute.model_checks import trial_length
from jackpot.compute.models import vocabulary_size
from jackpot.compute.ranks.group import SOLO, Ranks

# Largest difference of hidden states accepted by the check, relative to the largest: rounding, no more.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02}
_HALF_TOLERANCE = 0.1
# On a CPU masked attention runs at the rate of all other work. So it does on an H100 at hidden size 1024, where all
# other work is memory-bound; with wider models that work gets faster, and attention does not (docs/performance.md).
_MASK_FACTORS = {"cuda": 2.0}
_PROMPT_TOKENS = 3
_COMPLETION_TOKENS = (2, 5, 1, 4)


def attention_cost(
    models: Sequence[PreTrainedModel], device: torch.device, ranks: Ranks = SOLO
) -> AttentionCost | None:
    """The attention cost of the first of the models; None if completions cannot share a prompt's row in one of them.

    Args:
        models: the models that process the same rows.
        device: where they compute.
        ranks: over which they are sharded; all of them try, and rank 0's result counts.
    """
    costs = [_attention_tokens(model) for model in models]
    tokens = ranks.finding_of_rank_0(None if None in costs else costs[0])
    return None if tokens is None else AttentionCost(tokens, _MASK_FACTORS.get(device.type, 1.0))


def sees_all(config: PreTrainedConfig) -> bool:
    """Whether every token attends to all before it: our own mask would replace a sliding window's."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return set(layer_types) == {"full_attention"}
    return not (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))


def _attention_tokens(model: PreTrainedModel) -> float | None:
    """κ of :class:`jackpot.compute.batching.AttentionCost`, or None.

    Per token a layer multiplies once with its parameters, and twice with the head dimensions of each attended token:
    κ = parameters of the blocks / (2 · layers · heads · head dimension).
    """
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa" or not sees_all(config) or not _shares_exactly(model):
        return None
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    embedding = model.get_input_embeddings().weight.numel()  # type: ignore[operator]
    parameters = sum(parameter.numel() for parameter in model.base_model.parameters()) - embedding
    return float(parameters / (2 * config.num_hidden_layers * heads * head_dim))


@torch.no_grad()
def _shares_exactly(model: PreTrainedModel) -> bool:
    """Whether completions that share a row have the same hidden states as alone."""
    random = np.random.default_rng(0)
    vocabulary = vocabulary_size(model)
    prompt = random.integers(0, vocabulary, _PROMPT_TOKENS)
    # The last, in a row of its own, is as long as is cheap.
    lengths = (*_COMPLETION_TOKENS, trial_length(model) - _PROMPT_TOKENS)
    sequences = [np.r_[prompt, random.integers(0, vocabulary, length)] for length in lengths]
    prompts = [_PROMPT_TOKENS] * len(sequences)
    alone = completion_hidden(model, sequences, prompts)
    try:
        shared = completion_hidden(model, sequences, prompts, [len(sequences) - 1, 1])
    except (TypeError, ValueError):  # an architecture that takes no mask of ours, such as Falcon with ALiBi
        return False
    bound = _TOLERANCE.get(alone.dtype, _HALF_TOLERANCE) * float(alone.abs().max())
    return bool((shared - alone).abs().max() <= bound)
