"""What is this engine's own, beyond what the conformance suite asks of every engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from jackpot.errors import EngineError
from jackpot.rollout.engine import GroupRequest
from jackpot.rollout.transformers import engine as engine_module
from jackpot.rollout.transformers.decode_batch import PREFILL_TOKENS, eos_token_ids
from jackpot.rollout.transformers.engine import TransformersEngine


@pytest.fixture
def engine_name() -> str:
    """One architecture is enough here."""
    return "transformers-qwen3"


def test_the_end_of_sequence_is_what_the_model_says(load: Callable[..., PreTrainedModel]) -> None:
    model = load()
    assert eos_token_ids(model) == (1,)
    model.generation_config.eos_token_id = [1, 5]
    assert eos_token_ids(model) == (1, 5)
    model.generation_config.eos_token_id = None
    assert eos_token_ids(model) == (1,)
    model.config.eos_token_id = None
    assert eos_token_ids(model) == ()


async def test_what_torch_cannot_do_fails_the_batch_and_not_the_engine(
    load: Callable[..., PreTrainedModel], ask: Callable[..., GroupRequest]
) -> None:
    model = load()
    calls = 0

    def fail_in_the_third_pass(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of memory")

    model.base_model.register_forward_pre_hook(fail_in_the_third_pass)
    engine = TransformersEngine(model, max_batch_size=4, max_queue=64)
    try:
        with pytest.raises(EngineError, match=r"decoding failed \(RuntimeError: out of memory\)"):
            await engine.generate(ask(n=6))
        assert engine.status().num_running == engine.status().num_waiting == 0
        assert len(await engine.generate(ask(n=6))) == 6
    finally:
        await engine.close()


async def test_a_loop_that_fails_tells_everyone(
    load: Callable[..., PreTrainedModel], ask: Callable[..., GroupRequest]
) -> None:
    model = load()

    def fail(*_: object) -> None:
        raise KeyError("a mistake of ours")

    model.base_model.register_forward_pre_hook(fail)
    engine = TransformersEngine(model, max_batch_size=4, max_queue=64)
    watching = asyncio.create_task(engine.wait_failed())
    with pytest.raises(EngineError, match="the decoding loop failed"):
        await engine.generate(ask())
    with pytest.raises(EngineError, match="the decoding loop failed"):
        await watching
    with pytest.raises(EngineError, match="the engine has stopped"):
        await engine.generate(ask())
    await engine.close()


async def test_prompts_longer_than_one_prefill_pass_are_split(
    make_model: Callable[..., Path], ask: Callable[..., GroupRequest]
) -> None:
    from jackpot.compute.model_loading import load_causal_lm

    model = load_causal_lm(make_model(max_position_embeddings=4096), "float32", "cpu")
    assert PREFILL_TOKENS < 3 * 3000
    engine = TransformersEngine(model, max_batch_size=8, max_queue=64)
    try:
        requests = [ask(i, length=3000, max_tokens=3) for i in range(3)]
        alone = [(await engine.generate(request))[0] for request in requests]
        together = [group[0] for group in await asyncio.gather(*(engine.generate(request) for request in requests))]
        assert [t.token_ids.tolist() for t in alone] == [t.token_ids.tolist() for t in together]
    finally:
        await engine.close()


async def test_requests_that_find_an_idle_engine_together_start_together(
    load: Callable[..., PreTrainedModel], ask: Callable[..., GroupRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "GATHER_PAUSE_SECONDS", 1.0)
    monkeypatch.setattr(engine_module, "GATHER_SECONDS", 2.0)
    sizes: list[int] = []
    engine = TransformersEngine(load(), max_batch_size=8, max_queue=64, on_tokens=sizes.append)
    try:
        first = asyncio.create_task(engine.generate(ask(n=2)))
        await asyncio.sleep(0.1)  # long enough for an engine that does not wait to have started without the second
        await asyncio.gather(first, engine.generate(ask(n=3)))
        assert sizes[0] == 5
    finally:
        await engine.close()
