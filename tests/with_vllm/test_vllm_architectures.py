"""vLLM against transformers, for a dozen architectures: every swap is right or refused.

Each engine holds a tiny random model, and samples before a swap, after it, after a version that is refused before and
one that is refused after it was applied, and after a swap that broke off and was rolled back.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from probe_world import flip_bits, probe_by_hand
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from vllm_world import EngineElsewhere, EngineThread, SharedVllm

from jackpot.compute.model_loading import load_causal_lm
from jackpot.config import ModelConfig, RolloutConfig
from jackpot.errors import WeightCorruptError
from jackpot.rollout.engine import GroupRequest

MakeModel = Callable[..., Path]
Ask = Callable[..., GroupRequest]
FullLogprobs = Callable[..., torch.Tensor]

ARCHITECTURES = (
    *("qwen3", "llama", "qwen2", "mistral", "phi3", "granite", "gpt2"),  # vLLM's own models
    *("qwen3_moe", "mixtral"),  # with experts
    *("gpt_neox", "olmo2", "smollm3"),  # on vLLM's transformers backend
)
# Two kernels' float32, some twenty sums of fewer than a hundred terms each; wrong weights are nats away.
EXACT = 1e-4


@pytest.fixture(scope="module", params=ARCHITECTURES)
def vllm(request: pytest.FixtureRequest, engine_thread: EngineThread, make_model: MakeModel) -> Iterator[SharedVllm]:
    """A running vLLM with seed 0 of an architecture."""
    config = ModelConfig(model=str(make_model(request.param)))
    rollout = RolloutConfig(max_batch_size=16)
    running = engine_thread.start(config, rollout, extension="vllm_failing_worker.FailingWeightReading")
    yield running
    running.close()


@pytest.fixture
def architecture(request: pytest.FixtureRequest, vllm: SharedVllm) -> str:
    """Its name."""
    return str(request.node.callspec.params["vllm"])


class Sampled:
    """The engine's log-probabilities against transformers'."""

    def __init__(self, engine: EngineElsewhere, ask: Ask, full_logprobs: FullLogprobs) -> None:
        self.engine, self._ask, self._full_logprobs = engine, ask, full_logprobs
        self._number = 0

    async def error(self, model: PreTrainedModel, version: int) -> float:
        """The greatest difference over a few trajectories of a version, in nats."""
        self._number += 1
        request = self._ask(self._number, n=4, max_tokens=20)
        errors = []
        for trajectory in await self.engine.generate(request):
            assert [span.version for span in trajectory.version_spans] == [version]
            ids = torch.from_numpy(trajectory.token_ids.astype(np.int64))[:, None]
            expected = self._full_logprobs(model, request, trajectory.token_ids).gather(1, ids)[:, 0].numpy()
            errors.append(float(np.abs(trajectory.actor_logprobs - expected).max()))
        return max(errors)


async def test_every_swap_is_right_or_refused(
    vllm: SharedVllm,
    architecture: str,
    make_model: MakeModel,
    ask: Ask,
    full_logprobs: FullLogprobs,
    tmp_path: Path,
) -> None:
    directories = [make_model(architecture, seed=seed) for seed in range(3)]
    models = [load_causal_lm(directory, "float32", "cpu") for directory in directories]
    probes = [probe_by_hand(model, models[0]) for model in models]
    engine = vllm.engine(endless=True)
    sampled = Sampled(engine, ask, full_logprobs)
    assert await sampled.error(models[0], -1) < EXACT

    await engine.load_weights(1, directories[1], probes[1])
    assert await sampled.error(models[1], 1) < EXACT

    with pytest.raises(WeightCorruptError, match="has shape"):
        await engine.load_weights(2, reshaped(directories[2], tmp_path / "reshaped"), probes[2])
    with pytest.raises(WeightCorruptError, match="version 2 does not give the log-probabilities"):
        await engine.load_weights(2, damaged(directories[2], tmp_path / "damaged"), probes[2])
    assert await sampled.error(models[1], 1) < EXACT

    await engine._there(vllm.llm.collective_rpc("fail_next_update"))
    with pytest.raises(WeightCorruptError, match="out of luck"):
        await engine.load_weights(2, directories[2], probes[2])
    assert await sampled.error(models[1], 1) < EXACT

    await engine.load_weights(2, directories[2], probes[2])
    assert await sampled.error(models[2], 2) < EXACT


def reshaped(directory: Path, target: Path) -> Path:
    """A version with a tensor of another shape."""
    shutil.copytree(directory, target)
    tensors = load_file(target / "model.safetensors")
    name = max(tensors)
    tensors[name] = torch.zeros(3)
    save_file(tensors, target / "model.safetensors")
    return target


def damaged(directory: Path, target: Path) -> Path:
    """A version whose largest matrix of the first block changed after its hash was taken."""
    shutil.copytree(directory, target)
    tensors = load_file(target / "model.safetensors")
    block = {name: tensor for name, tensor in tensors.items() if ".0." in name and tensor.dim() == 2}
    flip_bits(target, max(block, key=lambda name: block[name].numel()))
    return target
