"""Padding of the vocabulary in vLLM: never sampled, with no share in any log-probability, before and after a swap."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm_world import EngineElsewhere, EngineThread, SharedVllm

from jackpot.compute.model_weights import save_weights
from jackpot.config import ModelConfig, RolloutConfig
from jackpot.errors import ConfigError
from jackpot.rollout.engine import GroupRequest

MakeModel = Callable[..., Path]
Ask = Callable[..., GroupRequest]

ROWS, VOCABULARY = 320, 288
EXACT = 1e-4


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def architecture(request: pytest.FixtureRequest) -> str:
    """With tied embeddings, and without."""
    return str(request.param)


@pytest.fixture(scope="module")
def vllm(engine_thread: EngineThread, make_model: MakeModel, architecture: str) -> Iterator[SharedVllm]:
    config = ModelConfig(model=str(make_model(architecture, vocab_size=ROWS)))
    running = engine_thread.start(config, RolloutConfig(max_batch_size=64), vocabulary=VOCABULARY)
    yield running
    running.close()


async def assert_exact(engine: EngineElsewhere, model_dir: Path, ask: Ask) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    requests = [ask(number, length=4, n=16, temperature=1.3) for number in range(4)]
    for request, group in zip(requests, await asyncio.gather(*map(engine.generate, requests)), strict=True):
        for trajectory in group:
            ids = torch.from_numpy(np.r_[request.prompt_token_ids, trajectory.token_ids].astype(np.int64))
            with torch.no_grad():
                logits = model(ids[None, :-1]).logits[0, len(request.prompt_token_ids) - 1 :, :VOCABULARY]
            expected = torch.log_softmax(logits / request.sampling.temperature, -1)
            sampled = ids[len(request.prompt_token_ids) :, None]
            assert int(sampled.max()) < VOCABULARY
            np.testing.assert_allclose(trajectory.actor_logprobs, expected.gather(1, sampled)[:, 0], atol=EXACT)
            assert trajectory.topk_ids is not None
            np.testing.assert_array_equal(trajectory.topk_ids, expected.topk(5).indices)


async def test_samples_are_those_of_the_vocabulary_before_and_after_a_swap(
    vllm: SharedVllm, make_model: MakeModel, architecture: str, ask: Ask, tmp_path: Path
) -> None:
    engine = vllm.engine()
    assert engine.limits.vocab_size == VOCABULARY
    await assert_exact(engine, make_model(architecture, vocab_size=ROWS), ask)
    newer = make_model(architecture, seed=1, vocab_size=ROWS)
    save_weights(AutoModelForCausalLM.from_pretrained(newer), tmp_path)
    await engine.load_weights(1, tmp_path)
    await assert_exact(engine, newer, ask)
    with pytest.raises(ConfigError, match="not in the vocabulary of 288 tokens"):
        await engine.generate(ask(0, stop_token_ids=(VOCABULARY,)))


def test_an_architecture_that_computes_logits_in_another_way_is_refused() -> None:
    from jackpot.rollout.vllm.vocabulary import SETTING, cut_padding

    model = torch.nn.Linear(2, 2)
    cut_padding(model, {})
    cut_padding(model, SimpleNamespace())
    with pytest.raises(RuntimeError, match="does not let its vocabulary be cut to 2 tokens"):
        cut_padding(model, {SETTING: 2})
