"""Architectures whose state is not keys and values per position are refused before they sample anything wrong."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, MambaConfig, MistralConfig, PreTrainedConfig

from jackpot.compute.model_loading import load_causal_lm
from jackpot.errors import ConfigError
from jackpot.rollout.transformers.decode_check import check_decoding

SIZES = {
    "vocab_size": 49,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.4,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_attention_models_pass_in_every_number_format(make_model, architecture: str, dtype: str) -> None:  # type: ignore[no-untyped-def]
    check_decoding(load_causal_lm(make_model(architecture), dtype, "cpu"))


@pytest.mark.parametrize(
    "config",
    [MistralConfig(**SIZES, sliding_window=3), Gemma2Config(**SIZES, sliding_window=3)],
    ids=["mistral", "gemma2"],
)
def test_rows_that_join_fit_models_with_sliding_windows(config: PreTrainedConfig) -> None:
    torch.manual_seed(0)
    check_decoding(AutoModelForCausalLM.from_config(config).eval())


def test_a_recurrent_state_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=49, hidden_size=32, num_hidden_layers=2)).eval()
    with pytest.raises(ConfigError, match=r"actor\.model = 'MambaForCausalLM': cannot be decoded with a cache of keys"):
        check_decoding(model, field="actor.model")
