"""What vLLM is started with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Phi3Config

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


def _longrope(directory: Path) -> str:
    factors = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Phi3Config(
        **sizes, max_position_embeddings=128, original_max_position_embeddings=32, pad_token_id=0, rope_scaling=factors
    )
    config.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize(("context_length", "longest", "fixed"), [(None, 32, False), (32, 32, False), (100, 64, True)])
def test_a_longrope_model_has_the_factors_of_the_jobs_longest_sequence(
    tmp_path: Path, context_length: int | None, longest: int, fixed: bool
) -> None:
    """Whatever max_model_len says: by itself vLLM would choose by it."""
    model = ModelConfig(model=_longrope(tmp_path), context_length=context_length)
    settings = RolloutConfig(vllm=VllmConfig(max_model_len=64))
    arguments = engine_arguments(model, settings, on_cpu=False)
    assert arguments["max_model_len"] == longest
    assert ("hf_overrides" in arguments) == fixed
    if fixed:
        config = arguments["hf_overrides"](Phi3Config.from_pretrained(tmp_path))
        assert config.rope_parameters["short_factor"] == config.rope_parameters["long_factor"] == [2.0, 3.0, 4.0, 5.0]


def test_dynamic_frequencies_are_refused_since_vllm_scales_short_sequences_too(
    make_model: MakeModel, tmp_path: Path
) -> None:
    shutil.copytree(make_model("llama"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_scaling"] = {"rope_type": "dynamic", "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelConfig(model=str(tmp_path))
    with pytest.raises(ConfigError, match=r"dynamic rotary .* Set rollout\.engine to transformers"):
        create_vllm_engine(model, RolloutConfig(), 1, field="actor.model", on_tokens=lambda n: None)


def test_the_ends_of_sequence_are_read_from_the_model(make_model: MakeModel) -> None:
    assert eos_token_ids(make_model("qwen3")) == (1,)


def test_a_device_that_this_build_cannot_use_is_refused(make_model: MakeModel) -> None:
    device = "cuda" if is_cpu_build() else "cpu"
    config = ModelConfig(model=str(make_model("qwen3")))
    with pytest.raises(ConfigError, match=rf"rollout\.device = '{device}': this is vLLM's .PU build\. Use auto"):
        create_vllm_engine(config, RolloutConfig(device=device), 1, field="actor.model", on_tokens=lambda n: None)


def test_a_directory_without_a_model_is_refused_before_vllm_is_imported(tmp_path: Path) -> None:
    config = ModelConfig(model=str(tmp_path))
    with pytest.raises(ConfigError, match=r"^actor\.model = .*holds no config\.json"):
        create_vllm_engine(config, RolloutConfig(), 1, field="actor.model", on_tokens=lambda n: None)
