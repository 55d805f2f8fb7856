"""What vLLM is started with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jackpot.config import ActorConfig, ModelConfig, RolloutConfig, VllmConfig
from jackpot.errors import ConfigError
from jackpot.rollout.vllm.launch import create_vllm_engine, engine_arguments, eos_token_ids, is_cpu_build

MakeModel = Callable[..., Path]


def test_settings_reach_vllm(make_model: MakeModel) -> None:
    actor = ActorConfig(
        model=str(make_model("qwen3")), dtype="bfloat16", quantization="fp8_per_channel", kv_cache_dtype="fp8"
    )
    vllm = VllmConfig(tensor_parallel_size=2, data_parallel_size=3, max_model_len=64, gpu_memory_fraction=0.5)
    arguments = engine_arguments(actor, RolloutConfig(max_batch_size=7, vllm=vllm), on_cpu=False)
    expected = {
        "dtype": "bfloat16",
        "quantization": "fp8_per_channel",
        "kv_cache_dtype": "fp8",
        "tensor_parallel_size": 2,
        "data_parallel_size": 3,
        "max_model_len": 64,
        "gpu_memory_utilization": 0.5,
        "kv_cache_memory_bytes": None,
        "max_num_seqs": 7,
        "enforce_eager": False,
        "enable_lora": False,
        "trust_remote_code": False,
    }
    assert {name: arguments[name] for name in expected} == expected


def test_on_cpu_the_longest_prompt_fits_into_one_step(make_model: MakeModel) -> None:
    model = ModelConfig(model=str(make_model("qwen3", max_position_embeddings=16384)))
    arguments = engine_arguments(model, RolloutConfig(), on_cpu=True)
    assert arguments["max_num_batched_tokens"] == 16384
    assert arguments["enable_chunked_prefill"] is False
    assert "quantization" not in arguments


def test_the_ends_of_sequence_are_read_from_the_model(make_model: MakeModel) -> None:
    assert eos_token_ids(make_model("qwen3")) == (1,)


def test_a_device_that_this_build_cannot_use_is_refused(make_model: MakeModel) -> None:
    device = "cuda" if is_cpu_build() else "cpu"
    config = ModelConfig(model=str(make_model("qwen3")))
    with pytest.raises(ConfigError, match=rf"rollout\.device = '{device}': this is vLLM's .PU build\. Use auto"):
        create_vllm_engine(config, RolloutConfig(device=device), 1, field="actor.model", on_tokens=lambda n: None)


def test_a_directory_without_a_model_is_refused_before_vllm_is_imported(tmp_path: Path) -> None:
    config = ModelConfig(model=str(tmp_path))
    with pytest.raises(ConfigError, match=r"^actor\.model = .*is not a directory with a config\.json"):
        create_vllm_engine(config, RolloutConfig(), 1, field="actor.model", on_tokens=lambda n: None)
