"""vLLM engines on tiny random models, shared by the tests here."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from patience import TEST_SECONDS
from transformers import PreTrainedModel
from unit.rollout.conftest import ask, full_logprobs, until, weights
from vllm_world import EngineElsewhere, EngineThread, SharedVllm

from jackpot.compute.model_loading import load_causal_lm
from jackpot.config import ModelConfig, RolloutConfig

__all__ = ["ask", "full_logprobs", "until", "weights"]

BATCH_SIZE = 64

pytest.register_assert_rewrite("unit.rollout.test_conformance")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this directory, and skip it where vLLM is not installed."""
    skip = pytest.mark.skip(reason="vLLM is not installed: make test-vllm runs these")
    missing = importlib.util.find_spec("vllm") is None
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))
            # vLLM's imports use what torch deprecates, and it leaves sockets to the garbage collector.
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::ResourceWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))
            if missing:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def engine_thread() -> EngineThread:
    """Where engines live."""
    return EngineThread()


@pytest.fixture(scope="session")
def shared_vllm(engine_thread: EngineThread, make_model: Callable[..., Path]) -> Iterator[Callable[..., SharedVllm]]:
    """``shared_vllm("qwen3")``: the running vLLM with seed 0 of an architecture."""
    running: dict[str, SharedVllm] = {}

    def get(architecture: str) -> SharedVllm:
        if architecture not in running:
            config = ModelConfig(model=str(make_model(architecture)))
            running[architecture] = engine_thread.start(config, RolloutConfig(max_batch_size=BATCH_SIZE))
        return running[architecture]

    yield get
    for vllm in running.values():
        vllm.close()


@pytest.fixture
def engine_name() -> str:
    """``<engine>-<architecture>``; the conformance tests run over several."""
    return "vllm-qwen3"


@pytest.fixture
def load(make_model: Callable[..., Path], engine_name: str) -> Callable[[int], PreTrainedModel]:
    """The engine's model, as ``version``'s weights would make it; version 0 is what the engine starts with."""

    def load_version(version: int = 0) -> PreTrainedModel:
        return load_causal_lm(make_model(engine_name.partition("-")[2], seed=version), "float32", "cpu")

    return load_version


@pytest.fixture
async def start_engine(
    shared_vllm: Callable[..., SharedVllm],
    engine_thread: EngineThread,
    make_model: Callable[..., Path],
    engine_name: str,
) -> AsyncIterator[Callable[..., EngineElsewhere]]:
    """Engines that are closed after the test. All of one batch size share a running vLLM."""
    architecture = engine_name.partition("-")[2]
    async with AsyncExitStack() as stack:

        def start(max_batch_size: int = BATCH_SIZE, max_queue: int = 256, **settings: Any) -> EngineElsewhere:
            vllm = shared_vllm(architecture)
            own = max_batch_size != BATCH_SIZE
            if own:
                config = ModelConfig(model=str(make_model(architecture)))
                vllm = engine_thread.start(config, RolloutConfig(max_batch_size=max_batch_size))
            engine = vllm.engine(max_queue=max_queue, owned=own, **settings)
            stack.push_async_callback(engine.close)
            return engine

        yield start
