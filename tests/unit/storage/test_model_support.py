"""Models that no pass computes as plain transformers does are refused from their files alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jackpot.errors import ConfigError
from jackpot.storage.model_configuration import (
    ServedContext,
    export_factors,
    fix_long_factors,
    served_context,
)
from jackpot.storage.model_support import Engine, check_model_directory

MakeModel = Callable[..., Path]


@pytest.fixture
def described(tmp_path: Path, make_model: MakeModel) -> Callable[..., str]:
    """A whole model whose config.json says something else: ``described(model_type="mamba")``."""
    directory = shutil.copytree(make_model("llama"), tmp_path / "model")
    plain = json.loads((directory / "config.json").read_text())

    def describe(**changes: Any) -> str:
        (directory / "config.json").write_text(json.dumps(plain | changes))
        return str(directory)

    return describe


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "llama4"}, "llama4 computes no hidden states"),
        ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}, "llama4 computes no hidden states"),
        ({"model_type": "gemma9", "text_config": {"model_type": "llama4_text"}}, "llama4_text computes no hidden"),
        ({"model_type": "bert"}, "bert does not attend causally"),
        ({"model_type": "newest", "is_encoder_decoder": True}, "newest is an encoder and a decoder"),
        ({"model_type": "deepseek_v32", "index_topk": 2048}, "deepseek_v32 chooses by an index"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "its weights are quantized (gptq)"),
        ({"model_type": None}, "its config.json names no model_type"),
    ],
)
@pytest.mark.parametrize("engine", ["auto", "transformers", "vllm", None])
def test_some_are_refused_on_every_engine(
    described: Callable[..., str], changes: dict[str, Any], problem: str, engine: Engine | None
) -> None:
    check_model_directory("policy.model", described(), engine)
    model = described(**changes)
    with pytest.raises(ConfigError) as caught:
        check_model_directory("policy.model", model, engine)
    assert (caught.value.field, caught.value.value) == ("policy.model", model)
    assert problem in caught.value.problem and caught.value.remedy


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"model_type": "mamba"}, "mamba has layers that keep a state"),
        ({"model_type": "newest", "layer_types": ["full_attention", "conv"]}, "newest has layers of kind conv"),
        ({"model_type": "gpt9", "layer_types": ["chunked_attention"]}, "gpt9 has layers of kind chunked_attention"),
    ],
)
def test_layers_with_a_state_are_refused_where_the_transformers_engine_may_sample(
    described: Callable[..., str], changes: dict[str, Any], layers: str
) -> None:
    model = described(**changes)
    for engine in ("auto", "transformers"):
        with pytest.raises(ConfigError, match=rf"{layers}, .* Set rollout\.engine to vllm\."):
            check_model_directory("policy.model", model, engine)
    check_model_directory("policy.model", model, "vllm")
    check_model_directory("policy.model", model, None)


def test_dynamic_frequencies_are_refused_on_vllm_only(described: Callable[..., str]) -> None:
    model = described(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    check_model_directory("policy.model", model, "transformers")
    with pytest.raises(ConfigError, match=r"dynamic rotary frequencies"):
        check_model_directory("policy.model", model, "vllm")
    with_alpha = described(rope_parameters={"rope_type": "dynamic", "alpha": 2.0, "rope_theta": 1e4})
    check_model_directory("policy.model", with_alpha, "vllm")


FACTORS = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}


@pytest.mark.parametrize(
    ("config", "context_length", "expected"),
    [
        ({"max_position_embeddings": 128}, None, ServedContext(128)),
        ({"n_positions": 128}, 100, ServedContext(100)),
        ({"max_seq_len": 128}, None, ServedContext(128)),
        ({}, None, ServedContext(None)),
        ({"text_config": {"max_position_embeddings": 64}}, None, ServedContext(64)),
        ({"max_position_embeddings": 128, "rope_scaling": {"type": "yarn"}}, None, ServedContext(128)),
        *(
            ({"max_position_embeddings": 128} | config, context_length, ServedContext(expected, factors))
            for config in (
                {"original_max_position_embeddings": 32, "rope_scaling": {"type": "longrope"} | FACTORS},
                {"original_max_position_embeddings": 32, "rope_scaling": {"type": "su"} | FACTORS},
                {
                    "model_type": "phi3",
                    "original_max_position_embeddings": 32,
                    "rope_scaling": {"type": "yarn"} | FACTORS,
                },
                {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 32} | FACTORS},
                {
                    "rope_parameters": {
                        "sliding_attention": {"rope_type": "default"},
                        "full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 32} | FACTORS,
                    }
                },
            )
            for context_length, expected, factors in (
                (None, 32, "short"),
                (32, 32, "short"),
                (33, 33, "long"),
                (128, 128, "long"),
            )
        ),
    ],
)
def test_the_longest_sequence_decides_the_factors(
    config: dict[str, Any], context_length: int | None, expected: ServedContext
) -> None:
    assert served_context("policy.model", "m", config, context_length) == expected


def test_long_factors_replace_the_short_ones_and_nothing_else() -> None:
    rope = {"rope_type": "longrope", "short_mscale": 1.1, "long_mscale": 1.3} | FACTORS
    config = {"rope_parameters": {"full_attention": dict(rope), "sliding_attention": {"rope_type": "default"}}}
    fix_long_factors(config)
    assert config["rope_parameters"]["full_attention"] == rope | {"short_factor": [3.0, 4.0], "short_mscale": 1.3}
    assert config["rope_parameters"]["sliding_attention"] == {"rope_type": "default"}


@pytest.mark.parametrize(("context_length", "exported"), [(None, [1.0, 2.0]), (32, [1.0, 2.0]), (33, [3.0, 4.0])])
def test_an_exported_model_has_the_factors_that_it_was_trained_with(
    described: Callable[..., str], context_length: int | None, exported: list[float]
) -> None:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 32} | FACTORS
    directory = Path(described(rope_scaling=rope))
    export_factors(directory, context_length)
    written = json.loads((directory / "config.json").read_text())["rope_scaling"]
    assert written == rope | {"short_factor": exported}
