"""Probes computed by transformers alone, and a file whose tensor was damaged after its hash was taken."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from jackpot.storage.weight_probe import PROBE_TOKENS, WeightProbe, probe_tokens


@torch.no_grad()
def plain_logprobs(model: PreTrainedModel, token_ids: list[int]) -> list[float]:
    """log p of each token but the first, given those before it, in float64 from the model's own logits."""
    ids = torch.tensor([token_ids], device=model.device)
    logprobs = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
    found: list[float] = logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
    return found


def probe_by_hand(model: PreTrainedModel, initial: PreTrainedModel, dtype: str = "float32") -> WeightProbe:
    """The probe of a version with a model's weights, in a job that began with the initial model's."""
    tokens = probe_tokens(model.config.vocab_size, PROBE_TOKENS + 1, seed=0)
    return WeightProbe(tokens, plain_logprobs(model, tokens), plain_logprobs(initial, tokens), dtype)


def flip_bits(weights_dir: Path, name: str) -> None:
    """Flip the sign of every number of one tensor, in place."""
    path = weights_dir / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = -tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
