"""A model whose log-probabilities depend on what else is in the pass is found before anything is computed with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config, PreTrainedModel

from jackpot.compute.model_checks import check_company, trial_length
from jackpot.compute.model_loading import load_causal_lm
from jackpot.errors import ConfigError

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def model_of(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def longrope() -> Phi3Config:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 4.0, 8.0, 16.0],
        "original_max_position_embeddings": 32,
    }
    return Phi3Config(**SIZES, max_position_embeddings=128, original_max_position_embeddings=32, rope_parameters=rope)


def dynamic() -> LlamaConfig:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    return LlamaConfig(**SIZES, max_position_embeddings=32, rope_parameters=rope)


def difference(model: PreTrainedModel, short: int, long: int) -> float:
    """What a long sequence in the pass does to the log-probabilities of a short one, by transformers' own logits."""
    ids = torch.arange(long) % 60
    row = torch.stack([ids, ids])
    with torch.no_grad():
        alone = model(row[:1, :short]).logits[0].log_softmax(-1)
        beside = model(row).logits[0, :short].log_softmax(-1)
    return float((beside - alone).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [longrope, dynamic])
def test_rotary_embeddings_of_the_whole_pass_are_refused_with_the_difference(
    config: Callable[[], Any], dtype: torch.dtype
) -> None:
    model = model_of(config(), dtype)
    assert difference(model, 8, 60) > 0.1
    with pytest.raises(ConfigError, match=r"change by 0?\.?\d.* nats when one of 60 is in the same pass") as caught:
        check_company(model, field="actor.model", longest=60)
    assert caught.value.field == "actor.model"
    # Where no sequence is that long, nothing of it happens.
    model = model_of(config(), dtype)
    assert difference(model, 8, 30) < (1e-4 if dtype == torch.float32 else 0.2)
    check_company(model, longest=30)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_models_are_taken_at_any_length(make_model: Callable[..., Path], architecture: str, dtype: str) -> None:
    model = load_causal_lm(make_model(architecture), dtype, "cpu")
    for longest in (None, 9, 128, 100_000):
        check_company(model, longest=longest)


def test_a_model_that_reads_a_window_is_taken() -> None:
    check_company(model_of(MistralConfig(**SIZES, sliding_window=4, max_position_embeddings=512)))


def test_trials_are_bounded_and_fit_the_model(make_model: Callable[..., Path]) -> None:
    assert trial_length(load_causal_lm(make_model("llama"), "float32", "cpu")) == 128
    assert trial_length(model_of(LlamaConfig(**SIZES, max_position_embeddings=131_072))) == 192


def test_the_trial_costs_the_same_however_long_the_sequences_are() -> None:
    model = model_of(LlamaConfig(**SIZES, max_position_embeddings=131_072))
    shapes = []
    hook = model.base_model.layers[0].register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape[:2]))
    check_company(model)
    hook.remove()
    assert shapes == [(2, 8)] * 3
