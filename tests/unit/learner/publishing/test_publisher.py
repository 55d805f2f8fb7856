"""What a version and an export hold: the hub's tensors, and the probe that engines are held to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from probe_world import plain_logprobs
from safetensors.torch import load_file
from tolerances import model_rounding
from transformers import AutoModelForCausalLM

from jackpot.compute.model_weights import own_tensors
from jackpot.config import parse_job
from jackpot.learner.publishing.publisher import WeightPublisher
from jackpot.learner.trainer import Trainer
from jackpot.storage.weight_probe import WeightProbe
from jackpot.storage.weights import WeightStore

from ..conftest import MakeTrainer

MakeModel = Callable[..., Path]


def publisher_of(trainer: Trainer, run_dir: Path) -> tuple[WeightPublisher, WeightStore]:
    store = WeightStore(run_dir / "weights")
    return WeightPublisher(trainer.job, store, run_dir, lambda: ()), store


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_neox"])
def test_versions_and_exports_are_what_save_pretrained_writes(
    make_model: MakeModel, make_trainer: MakeTrainer, tmp_path: Path, architecture: str
) -> None:
    model = str(make_model(architecture, seed=1))
    job = parse_job({"policy": {"model": model}, "actor": "policy", "task": {"name": "complement"}})
    trainer = make_trainer(job)
    initial = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    publisher, store = publisher_of(trainer, tmp_path)
    with torch.no_grad():
        for tensor in own_tensors(trainer.models["policy"])[0].values():
            tensor.mul_(1.01)  # a step of training
    publisher.publish(publisher.snapshot(trainer, 3))
    publisher.export(trainer)

    trainer.models["policy"].save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    for directory in (store.open("policy", 3), tmp_path / "export" / "policy"):
        ours = load_file(directory / "model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export" / "policy", dtype=torch.float32).eval()

    probe = WeightProbe.from_metadata(store.manifest("policy", 3).metadata)
    assert probe is not None and probe.dtype == "float32"
    tokens = list(probe.token_ids)
    for found, source in ((probe.logprobs, exported), (probe.initial_logprobs, initial)):
        expected = plain_logprobs(source, tokens)
        atol = model_rounding(source.config, len(tokens), max(map(abs, expected)))
        assert found == pytest.approx(expected, rel=0, abs=atol)
    assert probe.logprobs != probe.initial_logprobs


def test_weights_whose_logits_are_not_finite_are_published_without_a_probe(
    make_model: MakeModel, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    job = parse_job({"policy": {"model": str(make_model())}, "actor": "policy", "task": {"name": "complement"}})
    trainer = make_trainer(job)
    publisher, store = publisher_of(trainer, tmp_path)
    with torch.no_grad():
        trainer.models["policy"].model.norm.weight.fill_(3e38)  # still a float32; its products are not
    publisher.publish(publisher.snapshot(trainer, 0))
    assert store.manifest("policy", 0).metadata == {"obrs_lambda": trainer.lambda_control.obrs_lambda}
