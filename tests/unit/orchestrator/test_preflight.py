"""A job that cannot work is refused before any process starts."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from jackpot.config import parse_job
from jackpot.errors import ConfigError
from jackpot.orchestrator.preflight import validate_job


@pytest.fixture
def job_of(make_model):
    def make(**sections: Any):
        model = str(make_model())
        sampling = {"max_tokens": 64} | sections.pop("sampling", {})
        base = {"policy": {"model": model}, "actor": {"model": model}, "task": {"name": "complement"}}
        return parse_job({**base, "sampling": sampling, **sections})

    return make


def test_a_good_job_passes(job_of):
    validate_job(job_of(sampling={"stop": ["="]}))


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"task": {"name": "complment"}}, "task.name"),
        ({"policy": {"model": "/nowhere"}}, "policy.model"),
        ({"task": {"name": "complement", "chat_template": "always"}}, "task.chat_template"),
        ({"sampling": {"stop": ["ab"]}}, "sampling.stop"),
        ({"bus": {"max_bytes": 10_000}}, "bus.max_bytes"),
    ],
)
def test_what_cannot_work_is_named(job_of, sections, field):
    with pytest.raises(ConfigError) as caught:
        validate_job(job_of(**sections))
    assert caught.value.field == field
    assert caught.value.remedy


def test_a_policy_that_tells_no_vocabulary_is_named_where_the_orchestrator_needs_it(make_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(make_model(), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": None}))
    content = {"policy": {"model": str(model)}, "actor": "policy", "task": {"name": "complement"}}
    validate_job(parse_job(content, ["sampling.max_tokens=64"]))
    with pytest.raises(ConfigError, match=r"policy\.model = .*does not state vocab_size"):
        validate_job(parse_job(content, ["sampling.max_tokens=64", "scorer.reuse_reference=true"]))


def test_a_prompt_and_the_longest_completion_must_fit_into_the_models(job_of):
    # The tiny models have 128 positions, the task's first prompts 14 characters.
    validate_job(job_of(sampling={"max_tokens": 114}))
    with pytest.raises(ConfigError, match=r"14 tokens: .* 128 positions of policy\.model\. Set it to at most 114"):
        validate_job(job_of(sampling={"max_tokens": 115}))


def described(make_model, directory, **changes):
    """A model with another config.json; of fields that become None it says nothing."""
    shutil.copytree(make_model(), directory)
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    return {"policy": {"model": str(directory)}, "actor": "policy", "task": {"name": "complement"}}


def test_the_positions_of_a_gpt2_count_under_their_own_name(make_model, tmp_path):
    content = described(
        make_model, tmp_path / "model", model_type="gpt2", n_positions=256, max_position_embeddings=None
    )
    validate_job(parse_job(content, ["sampling.max_tokens=242"]))
    with pytest.raises(
        ConfigError, match=r"max_tokens = 300: .* the 256 positions of policy\.model\. Set it to at most 242"
    ):
        validate_job(parse_job(content, ["sampling.max_tokens=300"]))


def test_a_longrope_model_ends_with_its_short_factors_unless_the_job_says_more(make_model, tmp_path):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}
    rope["original_max_position_embeddings"] = 32
    content = described(make_model, tmp_path / "model", rope_parameters=rope)
    validate_job(parse_job(content, ["sampling.max_tokens=18"]))
    with pytest.raises(
        ConfigError, match=r"the 32 positions of .* \(policy\.context_length allows more, with the long ones\)"
    ):
        validate_job(parse_job(content, ["sampling.max_tokens=19"]))
    validate_job(parse_job(content, ["sampling.max_tokens=86", "policy.context_length=100"]))
    with pytest.raises(ConfigError, match=r"the 100 positions of policy\.context_length\. Set it to at most 86"):
        validate_job(parse_job(content, ["sampling.max_tokens=87", "policy.context_length=100"]))


def test_vllm_s_own_limit_counts_too(job_of):
    limited = {"rollout": {"engine": "vllm", "vllm": {"max_model_len": 14}}, "sampling": {"max_tokens": 8}}
    with pytest.raises(ConfigError, match=r"14 positions of rollout\.vllm\.max_model_len\. Use shorter prompts"):
        validate_job(job_of(**limited))
