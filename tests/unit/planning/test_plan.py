"""The planner against closed forms, and against the published figures for an 8 B policy with a 1.7 B actor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config
from typer.testing import CliRunner

from jackpot.cli import app
from jackpot.config import JobSpec, parse_job
from jackpot.errors import ConfigError
from jackpot.planning.hardware import Gpu, Utilization, gpu_named
from jackpot.planning.model_shape import KNOWN, ModelShape, read_shape
from jackpot.planning.plan import (
    Load,
    decode_seconds_per_token,
    expected_gain,
    flops_per_token,
    learner_host_bytes,
    make_plan,
)

POLICY, ACTOR = KNOWN["qwen3-8b"], KNOWN["qwen3-1.7b"]
SMALL = ModelShape(8, 2, 2, 1, 4, 16, 100, tied=True)


def make_job(*overrides: str) -> JobSpec:
    data = {
        "policy": {"model": "qwen3-8b", "dtype": "bfloat16"},
        "actor": {"model": "qwen3-1.7b", "dtype": "bfloat16"},
        "task": {"name": "complement"},
    }
    return parse_job(data, overrides)


def make_load(**changes: object) -> Load:
    load = Load(prompt_tokens=1e-9, completion_tokens=2e-9, concurrency=256, gpu=gpu_named("h100"))
    return replace(load, **changes)  # type: ignore[arg-type]


def test_a_small_model_by_hand() -> None:
    # Attention: q and o 8 × 8 each, k and v 8 × 4 each; feed-forward 3 × 8 × 16; one embedding of 100 × 8.
    assert (SMALL.attention, SMALL.expert, SMALL.embedding) == (192, 384, 800)
    assert SMALL.parameters == SMALL.active_parameters == 2 * (192 + 384) + 800
    assert SMALL.kv_bytes(2) == 2 * 2 * 1 * 4 * 2
    assert SMALL.attention_flops(10) == 4 * 10 * 8 * 2
    untied = replace(SMALL, tied=False, experts=4, active_experts=1)
    assert untied.parameters == 2 * (192 + 4 * 384 + 8 * 4) + 1600
    assert untied.active_parameters == untied.parameters - 2 * 3 * 384


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3-0.6b", 0.60), ("qwen3-1.7b", 1.72), ("qwen3-4b", 4.02), ("qwen3-8b", 8.19), ("qwen3-14b", 14.77),
     ("qwen3-32b", 32.76), ("qwen3-30b-a3b", 30.5)],
)  # fmt: skip
def test_known_models_have_their_published_sizes(name: str, billions: float) -> None:
    assert KNOWN[name].parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_arithmetic_of_an_8b_policy_and_a_1_7b_actor() -> None:
    per_token = flops_per_token(make_job(), POLICY, ACTOR, make_load())
    assert per_token.rollout / 1e9 == pytest.approx(3.4, abs=0.05)
    assert per_token.rollout_on_policy / 1e9 == pytest.approx(16.4, abs=0.05)
    assert per_token.scoring / 1e9 == pytest.approx(16.4, abs=0.05)
    assert per_token.policy_training / 1e9 == pytest.approx(49, abs=0.2)
    assert per_token.actor_training / 1e9 == pytest.approx(10, abs=0.4)
    frozen = flops_per_token(make_job("actor.train=false"), POLICY, ACTOR, make_load())
    assert frozen.actor_training == 0


def test_the_gain_at_short_context_and_where_the_cache_binds() -> None:
    """Sampling 80 % of an on-policy step, and scores from the learner's own pass."""
    job, short = make_job("scorer.reuse_reference=true"), make_load(concurrency=100_000)
    assert expected_gain(job, POLICY, ACTOR, short, 0.8) == pytest.approx(2.5, abs=0.1)
    # 33 GB of the policy's cache in use: decoding reads cache more than weights.
    tokens = 33e9 / POLICY.kv_bytes(2)
    bound = make_load(concurrency=32, prompt_tokens=tokens / 32)
    reading = decode_seconds_per_token(ACTOR, 2, 2, bound) / decode_seconds_per_token(POLICY, 2, 2, bound)
    assert reading == pytest.approx(0.59, abs=0.01)
    assert expected_gain(job, POLICY, ACTOR, bound, 0.8) == pytest.approx(1.4, abs=0.05)
    # Scores that take a pass of their own.
    several = make_job()
    by_hand = 1 / (0.8 * 0.2097 + 0.2 * (1 + 0.2097 + 0.4 / 0.5 / 3))
    assert expected_gain(several, POLICY, ACTOR, short, 0.8) == pytest.approx(by_hand, rel=1e-3)


def test_an_actor_as_large_as_the_policy_gains_nothing() -> None:
    reuse = "scorer.reuse_reference=true"
    assert expected_gain(make_job("actor.train=false", reuse), POLICY, POLICY, make_load(), 0.8) == pytest.approx(1)
    assert expected_gain(make_job(reuse), POLICY, POLICY, make_load(), 0.8) == pytest.approx(1 / (0.8 + 0.2 * 2))


def test_decoding_by_hand() -> None:
    gpu, full = Gpu(flops=1e3, bandwidth=100, memory=1), Utilization(1, 1, 1)
    load = Load(prompt_tokens=5, completion_tokens=10, concurrency=4, gpu=gpu, utilization=full)
    # Bytes: weights once, four caches of ten tokens; FLOPs: four tokens of 2N and their attention.
    read = SMALL.parameters * 2 + 4 * 10 * SMALL.kv_bytes(1)
    flops = 4 * (2 * SMALL.parameters + SMALL.attention_flops(10))
    assert decode_seconds_per_token(SMALL, 2, 1, load) == max(read / 100, flops / 1e3) / 4
    compute_bound = replace(load, gpu=replace(gpu, bandwidth=1e9))
    assert decode_seconds_per_token(SMALL, 2, 1, compute_bound) == flops / 1e3 / 4


def test_bytes_and_times_of_a_job() -> None:
    job = make_job(
        "sampling.max_tokens=1000", "sampling.group_size=8", "learner.groups_per_batch=16", "rollout.replicas=2",
        "scorer.replicas=3",
    )  # fmt: skip
    plan = make_plan(job, POLICY, ACTOR, make_load(prompt_tokens=200, completion_tokens=800))
    tokens = 16 * 8 * 800
    assert plan.tokens_per_step == tokens
    assert plan.bus_bytes_per_step == {"to_score": tokens * (8 + 20 * 6), "to_train": tokens * (8 + 21)}
    assert plan.weight_bytes_per_version == {
        "written": 2 * (POLICY.parameters + ACTOR.parameters),
        "read_by_scorers": 3 * 2 * POLICY.parameters,
        "read_by_rollouts": 2 * 2 * ACTOR.parameters,
    }
    seen = 16 * 8 * 1000
    assert plan.step_seconds.scorer == pytest.approx(seen * plan.flops_per_token.scoring / (989e12 * 0.5) / 3)
    training = plan.flops_per_token.policy_training + plan.flops_per_token.actor_training
    assert plan.step_seconds.learner == pytest.approx(seen * training / (989e12 * 0.4))
    assert plan.bottleneck == "learner"
    assert plan.memory_bytes["rollout"] == {
        "weights": 2 * ACTOR.parameters, "attention_cache": 256 * 1200 * ACTOR.kv_bytes(2),
    }  # fmt: skip
    assert plan.memory_bytes["learner"]["copies"] == 2 * (POLICY.parameters + ACTOR.parameters)
    exact = make_job("policy.dtype=float32", "actor.dtype=float32")
    assert make_plan(exact, POLICY, ACTOR, make_load()).memory_bytes["learner"]["copies"] == 0
    assert plan.memory_bytes["learner"]["optimizer"] == 2 * 4 * (POLICY.parameters + ACTOR.parameters)
    smaller = make_job("learner.processes=8", "learner.activation_checkpointing=true", "learner.groups_per_batch=128")
    shards = make_plan(smaller, POLICY, ACTOR, make_load(prompt_tokens=200, completion_tokens=800)).memory_bytes
    assert shards["learner"]["weights"] == 4 * (POLICY.parameters + ACTOR.parameters) / 8
    blocks = sum(2 * (shape.parameters - (shape.layers - 1) * shape.block) for shape in (POLICY, ACTOR))
    assert shards["learner"]["copies"] == blocks
    assert shards["learner"]["activations"] < plan.memory_bytes["learner"]["activations"] / 10
    scorer = make_plan(make_job("scorer.processes=4"), POLICY, ACTOR, make_load()).memory_bytes["scorer"]
    assert scorer["weights"] == 2 * POLICY.parameters / 4
    assert scorer["gathered"] == 2 * (POLICY.parameters - (POLICY.layers - 1) * POLICY.block)
    assert any("the learner needs" in warning for warning in plan.warnings)


def test_a_scorer_holds_versions_in_host_memory() -> None:
    def host(*overrides: str) -> dict[str, float]:
        return make_plan(make_job(*overrides), POLICY, ACTOR, make_load()).scorer_host_bytes

    kept_and_arriving = {"policy_versions": (2 + 1) * 2 * POLICY.parameters}
    assert host() == host("scorer.reference_age=0") == host("scorer.processes=4") == kept_and_arriving
    older = host("orchestrator.max_staleness=3", "scorer.reference_age=3", "policy.dtype=float32")
    assert older == {"policy_versions": (4 + 1) * 4 * POLICY.parameters}
    with_actor = host("algorithm.correction.normalizer=union_tail")
    assert with_actor == kept_and_arriving | {"actor_versions": (3 + 1) * 2 * ACTOR.parameters}
    assert host("scorer.reuse_reference=true") == {}


def test_without_scorers_nothing_is_planned_for_them() -> None:
    job = make_job("scorer.reuse_reference=true", "sampling.max_tokens=1000")
    load = make_load(prompt_tokens=200, completion_tokens=800)
    plan = make_plan(job, POLICY, ACTOR, load)
    tokens = job.learner.groups_per_batch * job.sampling.group_size * 800
    assert list(plan.memory_bytes) == ["rollout", "learner"]
    assert plan.step_seconds.scorer == plan.flops_per_token.scoring == plan.flops_per_step.scoring == 0
    assert plan.weight_bytes_per_version["read_by_scorers"] == 0
    assert plan.bus_bytes_per_step == {"to_score": 0, "to_train": tokens * (8 + 20 * 6)}
    without_candidates = make_job("scorer.reuse_reference=true", "algorithm.correction=tis")
    assert make_plan(without_candidates, POLICY, ACTOR, load).bus_bytes_per_step["to_train"] == tokens * 8


def test_shapes_from_files(tmp_path: Path) -> None:
    config = {
        "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
        "intermediate_size": 16, "vocab_size": 100, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_shape("policy.model", str(tmp_path)) == SMALL
    assert read_shape("policy.model", str(tmp_path / "config.json")) == SMALL
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}))
    assert read_shape("policy.model", str(tmp_path)) == SMALL
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": None}))
    with pytest.raises(ConfigError, match="has no vocab_size"):
        read_shape("policy.model", str(tmp_path))
    with pytest.raises(ConfigError, match=r"actor\.model.*qwen3-1\.7b"):
        read_shape("actor.model", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"--gpu.*h100"):
        gpu_named("abacus")


def test_the_command(tmp_path: Path) -> None:
    job_file = tmp_path / "job.yaml"
    job_file.write_text(make_job().model_dump_json())
    arguments = ["plan", str(job_file), "sampling.max_tokens=2048", "--rollout-share", "0.8", "--concurrency", "32"]
    text = CliRunner().invoke(app, arguments)
    assert text.exit_code == 0, text.output
    assert "expected gain over on-policy training" in text.output
    result = CliRunner().invoke(app, [*arguments, "--json", "--policy", "qwen3-4b", "--gpu", "h200"])
    plan = json.loads(result.output)
    assert plan["policy_parameters"] == KNOWN["qwen3-4b"].parameters
    assert plan["on_policy_rollout_share"] == 0.8


@pytest.mark.parametrize(
    "shape", [ModelShape(64, 4, 4, 2, 16, 192, 50, tied=True), ModelShape(96, 4, 2, 2, 32, 128, 50, tied=True)]
)
def test_activations_are_what_autograd_keeps(shape: ModelShape) -> None:
    """Of Qwen3 in bfloat16: bytes of all tensors that are saved for the backward pass, beside parameters."""
    assert kept_bytes(shape) == pytest.approx(2 * shape.activation_elements(), rel=0.1)


def kept_bytes(shape: ModelShape, num_tokens: int = 64) -> float:
    """A token's, of the layers: those of the model less those of the same model with half of its layers, twice."""
    whole, half = (_kept(replace(shape, layers=layers), num_tokens) for layers in (shape.layers, shape.layers // 2))
    return 2 * (whole - half) / num_tokens


def _kept(shape: ModelShape, num_tokens: int) -> int:
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = model.base_model(input_ids=torch.zeros(1, num_tokens, dtype=torch.int64), use_cache=False)
    assert states.last_hidden_state.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in parameters)


def test_past_versions_that_the_canary_keeps_in_host_memory() -> None:
    def kept(*overrides: str) -> tuple[float, float]:
        found = learner_host_bytes(make_job(*overrides), POLICY, ACTOR)
        return found["past_versions"], found["own_weights"]

    # In the format that computes; its own weights are float32 where they are shards.
    assert kept() == (ACTOR.parameters * 2, ACTOR.parameters * 2)
    assert kept("orchestrator.max_staleness=3") == (3 * ACTOR.parameters * 2, ACTOR.parameters * 2)
    assert kept("learner.processes=4") == (ACTOR.parameters * 2 / 4, ACTOR.parameters * 4 / 4)
    assert kept("actor=policy") == (POLICY.parameters * 2, POLICY.parameters * 2)
    for nothing in ("orchestrator.max_staleness=0", "actor.train=false", "alarms.canary_sequences=0"):
        assert kept(nothing) == (0, 0)
