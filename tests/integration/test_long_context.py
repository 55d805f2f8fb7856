"""A job's longest sequence decides a longrope model's factors in every service, and in what the job exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedModel

from jackpot.config import JobSpec, parse_job
from jackpot.config.environment import ServiceEnvironment
from jackpot.learner.models.start import build_trainer
from jackpot.learner.publishing.publisher import WeightPublisher
from jackpot.loop import _load
from jackpot.rollout.engine_choice import create_engine
from jackpot.scorer.target import HeldPolicy
from jackpot.storage.weights import WeightStore
from jackpot.telemetry import Metrics

EXACT = 1e-4  # nats
SHORT, LONG = [1.0, 1.1, 1.2, 1.3], [1.5, 3.0, 7.0, 15.0]
TOKENS = torch.arange(3, 23)[None]  # fewer than the short factors' 32


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Phi3Config(
        vocab_size=49,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        pad_token_id=2,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        rope_scaling={"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
    )
    directory = tmp_path_factory.mktemp("phi3")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def job_of(model: Path, context_length: int | None) -> JobSpec:
    policy = {"model": str(model), "context_length": context_length}
    content = {"policy": policy, "actor": "policy", "task": {"name": "complement"}}
    return parse_job(content, ["rollout.engine=transformers", "rollout.device=cpu", "learner.device=cpu"])


@torch.no_grad()
def logprobs(model: PreTrainedModel) -> torch.Tensor:
    return torch.log_softmax(model(input_ids=TOKENS).logits[0], dim=-1)


@pytest.mark.parametrize(("context_length", "factors"), [(None, SHORT), (32, SHORT), (100, LONG)])
async def test_each_service_and_the_export_have_the_same_factors(
    phi3: Path, tmp_path: Path, context_length: int | None, factors: list[float]
) -> None:
    config = Phi3Config.from_pretrained(phi3)
    config.rope_parameters |= {"short_factor": factors, "long_factor": factors}
    plain = AutoModelForCausalLM.from_pretrained(phi3, config=config).eval()
    expected = logprobs(plain)
    job = job_of(phi3, context_length)
    environment = ServiceEnvironment(run_dir=tmp_path, job_id="job", role="policy")

    trainer, _ = build_trainer(environment, job)
    engine = create_engine(job, environment, Metrics("job", CollectorRegistry()))
    await engine.close()
    WeightPublisher(job, WeightStore(tmp_path / "weights"), tmp_path, lambda: ()).export(trainer)
    models = {
        "learner": trainer.models["policy"],
        "engine": engine._model,  # type: ignore[attr-defined]
        "scorer": HeldPolicy(job.policy, "cpu").model,
        "loop": _load(job.policy, "policy.model", 49),
        "export": AutoModelForCausalLM.from_pretrained(tmp_path / "export" / "policy").eval(),
    }
    for name, model in models.items():
        assert float((logprobs(model) - expected).abs().max()) < EXACT, name
    described = json.loads((tmp_path / "export" / "policy" / "config.json").read_text())
    assert described["rope_parameters"]["short_factor"] == factors
    assert described["rope_parameters"]["long_factor"] == LONG
