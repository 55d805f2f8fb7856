"""Engines on tiny random models. The conformance tests run over every engine and architecture named here."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from jackpot.compute.model_loading import load_causal_lm
from jackpot.compute.model_weights import save_weights
from jackpot.rollout.engine import GroupRequest, RolloutEngine, Sampling
from jackpot.rollout.transformers.engine import TransformersEngine

MakeModel = Callable[..., Path]
StartEngine = Callable[..., RolloutEngine]
ENDLESS_POSITIONS = 512


@pytest.fixture(params=["transformers-qwen3", "transformers-llama"])
def engine_name(request: pytest.FixtureRequest) -> str:
    """``<engine>-<architecture>``."""
    return str(request.param)


@pytest.fixture
def load(make_model: MakeModel, engine_name: str) -> Callable[[int], PreTrainedModel]:
    """The engine's model, as ``version``'s weights would make it; version 0 is what the engine starts with."""

    def load_version(version: int = 0) -> PreTrainedModel:
        return load_causal_lm(make_model(engine_name.partition("-")[2], seed=version), "float32", "cpu")

    return load_version


@pytest.fixture
def weights(load: Callable[[int], PreTrainedModel], tmp_path: Path) -> Callable[[int], Path]:
    """A directory with the weights of a version."""

    def directory_of(version: int) -> Path:
        directory = tmp_path / f"weights-{version}"
        if not directory.exists():
            directory.mkdir()
            save_weights(load(version), directory)
        return directory

    return directory_of


@pytest.fixture
async def start_engine(load: Callable[[int], PreTrainedModel]) -> AsyncIterator[StartEngine]:
    """Engines that are closed after the test."""
    async with AsyncExitStack() as stack:

        def start(max_batch_size: int = 64, max_queue: int = 256, endless: bool = False) -> RolloutEngine:
            model = load(0)
            if endless:  # no end of sequence: a test can do something while trajectories run
                model.config.eos_token_id = None
                model.generation_config = None
                model.config.max_position_embeddings = ENDLESS_POSITIONS
            engine = TransformersEngine(model, max_batch_size=max_batch_size, max_queue=max_queue)
            stack.push_async_callback(engine.close)
            return engine

        yield start


@pytest.fixture
def ask() -> Callable[..., GroupRequest]:
    """Requests with a random prompt: ``ask(0, length=5, n=2, temperature=0.7)``."""

    def make(prompt: int = 0, *, length: int = 5, n: int = 1, **sampling: object) -> GroupRequest:
        ids = np.random.default_rng(prompt).integers(3, 49, length).astype(np.uint32)
        settings = {"temperature": 1.0, "max_tokens": 12, "top_logprobs": 5, "seed": 7 + prompt, **sampling}
        return GroupRequest(
            group_id=f"g{prompt}", prompt_token_ids=ids, num_trajectories=n, sampling=Sampling(**settings)
        )

    return make


@pytest.fixture
def full_logprobs() -> Callable[..., torch.Tensor]:
    """Log-probabilities ``[T, V]`` at a trajectory's positions by one full forward pass, in float64."""

    def compute(model: PreTrainedModel, request: GroupRequest, token_ids: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(np.concatenate([request.prompt_token_ids, token_ids]).astype(np.int64))
        exact = copy.deepcopy(model).double()
        exact.set_experts_implementation("eager")  # the grouped kernels know no float64
        with torch.no_grad():
            logits = exact(input_ids=ids[None, :-1]).logits[0, len(request.prompt_token_ids) - 1 :]
        return torch.log_softmax(logits / (request.sampling.temperature or 1.0), dim=-1)

    return compute


@pytest.fixture
def until() -> Callable[[Callable[[], bool], str], Awaitable[None]]:
    """Wait for a condition; fail loudly after ten seconds."""
    import asyncio
    import time

    async def wait(condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, f"waited 10 s for {what}"
            await asyncio.sleep(0.001)

    return wait
