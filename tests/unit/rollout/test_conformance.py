"""What every inference engine must do. Runs over all engines and architectures of conftest.py."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from probe_world import flip_bits, probe_by_hand
from safetensors.torch import load_file, save_file
from tolerances import model_rounding, unit_roundoff
from transformers import PreTrainedModel

from jackpot.errors import ConfigError, EngineError, QueueFullError, WeightCorruptError
from jackpot.rollout.engine import GroupRequest, RolloutEngine
from jackpot.trajectory import Trajectory

StartEngine = Callable[..., RolloutEngine]
Load = Callable[[int], PreTrainedModel]
Weights = Callable[[int], Path]
Ask = Callable[..., GroupRequest]
FullLogprobs = Callable[..., torch.Tensor]
Until = Callable[[Callable[[], bool], str], Awaitable[None]]

EOS = 1


def assert_same(left: Trajectory, right: Trajectory, model: PreTrainedModel) -> None:
    """The same tokens; log-probabilities up to rounding."""
    assert left.token_ids.tolist() == right.token_ids.tolist()
    most = model_rounding(model.config, model.config.max_position_embeddings, float(left.actor_logprobs.min()))
    np.testing.assert_allclose(left.actor_logprobs, right.actor_logprobs, atol=most, rtol=0)
    assert left.finish_reason == right.finish_reason


async def run_slowly(engine: RolloutEngine, request: GroupRequest, until: Until) -> asyncio.Task[Any]:
    """Start a long request and return while it runs."""
    task = asyncio.create_task(engine.generate(request))
    await until(lambda: engine.status().tokens_generated > 0 and engine.status().num_running > 0, "the first tokens")
    return task


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_logprobs_and_candidates_are_those_of_a_full_forward_pass(
    start_engine: StartEngine, load: Load, ask: Ask, full_logprobs: FullLogprobs, temperature: float
) -> None:
    engine, model = start_engine(), load(0)
    requests = [ask(i, length=length, n=3, temperature=temperature) for i, length in enumerate([1, 4, 9, 4])]
    for request, group in zip(
        requests, await asyncio.gather(*(engine.generate(request) for request in requests)), strict=True
    ):
        for trajectory in group:
            expected = full_logprobs(model, request, trajectory.token_ids)
            sampled = expected.gather(1, torch.from_numpy(trajectory.token_ids.astype(np.int64))[:, None])[:, 0]
            error = model_rounding(model.config, 9 + 12, expected)
            np.testing.assert_allclose(trajectory.actor_logprobs, sampled.numpy(), atol=error, rtol=0)
            top = expected.topk(5)
            assert trajectory.topk_ids is not None
            assert trajectory.topk_logprobs is not None
            assert trajectory.topk_ids.tolist() == top.indices.tolist()
            rounded = unit_roundoff(torch.float16)
            np.testing.assert_allclose(trajectory.topk_logprobs, top.values.numpy(), atol=error, rtol=rounded)
            assert (np.diff(trajectory.topk_logprobs, axis=1) <= 0).all()


async def test_a_group_has_its_trajectories_in_order_with_the_agreed_types(start_engine: StartEngine, ask: Ask) -> None:
    group = await start_engine().generate(ask(n=4, top_logprobs=3))
    assert [trajectory.trajectory_id for trajectory in group] == ["g0#0", "g0#1", "g0#2", "g0#3"]
    for trajectory in group:
        assert trajectory.token_ids.dtype == np.uint32
        assert trajectory.actor_logprobs.dtype == np.float32
        assert trajectory.topk_ids is not None
        assert trajectory.topk_logprobs is not None
        assert (trajectory.topk_ids.dtype, trajectory.topk_logprobs.dtype) == (np.uint32, np.float16)
        assert trajectory.topk_ids.shape == trajectory.topk_logprobs.shape == (trajectory.num_tokens, 3)
        assert trajectory.version_spans[0].start == 0
        assert trajectory.version_spans[-1].end == trajectory.num_tokens
    assert len({tuple(trajectory.token_ids.tolist()) for trajectory in group}) > 1


async def test_samples_follow_the_models_distribution(
    start_engine: StartEngine, load: Load, ask: Ask, full_logprobs: FullLogprobs
) -> None:
    request = ask(n=4000, max_tokens=1, temperature=0.7, top_logprobs=0)
    group = await start_engine(max_batch_size=512, max_queue=4000).generate(request)
    counts = np.bincount([int(trajectory.token_ids[0]) for trajectory in group], minlength=49)
    expected = full_logprobs(load(0), request, np.array([0])).exp()[0].numpy() * 4000
    likely = expected >= 5
    chi_square = (((counts - expected) ** 2) / expected)[likely].sum()
    # Mean d and variance 2d: five standard deviations.
    degrees = likely.sum()
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)


async def test_the_same_seed_gives_the_same_trajectories_and_another_seed_others(
    start_engine: StartEngine, load: Load, ask: Ask
) -> None:
    engine = start_engine()
    first, again, other = [await engine.generate(request) for request in (ask(n=3), ask(n=3), ask(n=3, seed=2**64 - 1))]
    for left, right in zip(first, again, strict=True):
        assert_same(left, right, load(0))
    assert [t.token_ids.tolist() for t in first] != [t.token_ids.tolist() for t in other]


async def test_trajectories_do_not_depend_on_what_else_is_in_the_batch(
    start_engine: StartEngine, load: Load, ask: Ask
) -> None:
    alone, crowded = start_engine(), start_engine(max_batch_size=7)
    requests = [ask(i, length=2 + i, n=2 + i % 2, temperature=0.5 + 0.25 * (i % 3)) for i in range(6)]
    expected = [await alone.generate(request) for request in requests]
    found = await asyncio.gather(*(crowded.generate(request) for request in requests))
    for left, right in zip(expected, found, strict=True):
        for one, two in zip(left, right, strict=True):
            assert_same(one, two, load(0))


async def test_requests_join_a_running_batch_and_stay_exact(
    start_engine: StartEngine, load: Load, ask: Ask, full_logprobs: FullLogprobs, until: Until
) -> None:
    engine, model = start_engine(endless=True), load(0)
    long = ask(0, length=3, n=2, max_tokens=100)
    running = await run_slowly(engine, long, until)
    late = ask(1, length=30, n=2, max_tokens=5)
    joined = await engine.generate(late)
    assert not running.done()  # it did not wait for the batch to end
    for request, group in ((late, joined), (long, await running)):
        for trajectory in group:
            expected = full_logprobs(model, request, trajectory.token_ids)
            sampled = expected.gather(1, torch.from_numpy(trajectory.token_ids.astype(np.int64))[:, None])[:, 0]
            error = model_rounding(model.config, 3 + 100, expected)
            np.testing.assert_allclose(trajectory.actor_logprobs, sampled.numpy(), atol=error, rtol=0)


async def test_the_end_of_sequence_and_stop_tokens_end_a_trajectory(start_engine: StartEngine, ask: Ask) -> None:
    engine = start_engine()
    plain = [t for i in range(8) for t in await engine.generate(ask(i, n=4, max_tokens=60))]
    assert {trajectory.finish_reason for trajectory in plain} == {"stop", "length"}
    for trajectory in plain:
        ended = trajectory.token_ids[-1] == EOS
        assert trajectory.finish_reason == ("stop" if ended else "length")
        assert EOS not in trajectory.token_ids[:-1]
        assert ended or trajectory.num_tokens == 60
    # A token that a trajectory really holds, as an extra stop token, cuts it right there.
    (whole,) = await engine.generate(ask(0, max_tokens=60))
    stop = int(whole.token_ids[2])
    (cut,) = await engine.generate(ask(0, max_tokens=60, stop_token_ids=(stop, 48)))
    assert cut.token_ids.tolist() == whole.token_ids[: whole.token_ids.tolist().index(stop) + 1].tolist()
    assert cut.finish_reason == "stop"


async def test_temperature_zero_takes_the_most_probable_token(
    start_engine: StartEngine, load: Load, ask: Ask, full_logprobs: FullLogprobs
) -> None:
    engine, request = start_engine(), ask(n=2, temperature=0.0)
    (first, second), _ = await asyncio.gather(engine.generate(request), engine.generate(ask(3, n=3)))
    model = load(0)
    expected = full_logprobs(model, request, first.token_ids)
    assert first.token_ids.tolist() == second.token_ids.tolist() == expected.argmax(dim=1).tolist()
    error = model_rounding(model.config, 5 + 12, expected)
    np.testing.assert_allclose(first.actor_logprobs, expected.max(dim=1).values.numpy(), atol=error, rtol=0)


async def test_no_candidates_are_returned_where_none_were_asked_for(start_engine: StartEngine, ask: Ask) -> None:
    engine = start_engine()
    (bare,), (wide,) = await asyncio.gather(
        engine.generate(ask(0, top_logprobs=0)), engine.generate(ask(1, top_logprobs=49))
    )
    assert bare.topk_ids is None
    assert bare.topk_logprobs is None
    assert wide.topk_ids is not None
    assert sorted(wide.topk_ids[0].tolist()) == list(range(49))


async def test_weights_change_between_tokens_and_every_token_matches_its_version(
    start_engine: StartEngine,
    load: Load,
    weights: Weights,
    ask: Ask,
    full_logprobs: FullLogprobs,
    until: Until,
) -> None:
    engine = start_engine(endless=True)
    await engine.load_weights(1, weights(1))
    # Long enough to live through both, however busy the machine is that reads them meanwhile.
    max_tokens = engine.limits.max_positions - 18
    requests = [ask(i, length=2 + 3 * i, n=2, max_tokens=max_tokens) for i in range(3)]
    tasks = [asyncio.create_task(engine.generate(request)) for request in requests]
    for version, tokens in ((2, 30), (5, 120)):
        await until(lambda tokens=tokens: engine.status().tokens_generated > tokens, f"{tokens} tokens")
        await engine.load_weights(version, weights(version))
        assert engine.version == version
    groups = await asyncio.gather(*tasks)
    models = {version: load(version) for version in (1, 2, 5)}
    spans = [trajectory.version_spans for group in groups for trajectory in group]
    assert [span.version for span in max(spans, key=len)] == [1, 2, 5]  # some trajectory lived through both swaps
    for request, group in zip(requests, groups, strict=True):
        for trajectory in group:
            reached = 0
            for span in trajectory.version_spans:
                assert span.start == reached < span.end
                reached = span.end
                expected = full_logprobs(models[span.version], request, trajectory.token_ids)
                ids = torch.from_numpy(trajectory.token_ids.astype(np.int64))[:, None]
                sampled = expected.gather(1, ids)[span.start : span.end, 0].numpy()
                found = trajectory.actor_logprobs[span.start : span.end]
                error = model_rounding(models[span.version].config, engine.limits.max_positions, expected)
                np.testing.assert_allclose(found, sampled, atol=error, rtol=0)
            assert reached == trajectory.num_tokens


async def test_new_requests_are_sampled_by_the_version_held(
    start_engine: StartEngine, load: Load, weights: Weights, ask: Ask
) -> None:
    engine = start_engine()
    assert engine.version == -1
    await engine.load_weights(3, weights(3))
    (trajectory,) = await engine.generate(ask())
    assert [(span.version, span.start) for span in trajectory.version_spans] == [(3, 0)]
    assert trajectory.oldest_version == 3


async def test_an_older_version_is_never_loaded(start_engine: StartEngine, weights: Weights) -> None:
    engine = start_engine()
    await engine.load_weights(3, weights(3))
    await engine.load_weights(2, weights(2))
    assert engine.version == 3


async def test_weights_that_do_not_fit_leave_the_engine_as_it_was(
    start_engine: StartEngine, load: Load, weights: Weights, ask: Ask, tmp_path: Path
) -> None:
    engine = start_engine()
    await engine.load_weights(1, weights(1))
    (before,) = await engine.generate(ask())
    tensors = load_file(weights(2) / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, weights(2) / "model.safetensors")
    with pytest.raises(WeightCorruptError, match=r"model\.norm\.weight"):
        await engine.load_weights(2, weights(2))
    with pytest.raises(FileNotFoundError):
        await engine.load_weights(2, tmp_path / "pruned")
    assert engine.version == 1
    assert_same(before, (await engine.generate(ask()))[0], load(1))


async def test_weights_that_do_not_give_their_probe_are_refused_and_the_old_ones_go_on(
    start_engine: StartEngine, load: Load, weights: Weights, ask: Ask, full_logprobs: FullLogprobs, until: Until
) -> None:
    """Two versions whose bytes changed after their hash was taken: the very first, and one under load."""
    engine = start_engine(endless=True)
    models = [load(version) for version in range(3)]
    probes = [probe_by_hand(model, models[0]) for model in models]
    flip_bits(weights(1), "model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(WeightCorruptError, match="version 1 does not give the log-probabilities"):
        await engine.load_weights(1, weights(1), probes[1])
    assert engine.version == -1
    await engine.load_weights(2, weights(2), probes[2])
    running = await run_slowly(engine, ask(0, n=2, max_tokens=100), until)
    with pytest.raises(WeightCorruptError, match="version 3 does not give the log-probabilities"):
        await engine.load_weights(3, weights(1), probes[1])
    assert engine.version == 2
    try:
        groups = [(ask(0), await running)]
    except EngineError:  # it may have sampled from what was refused: the caller sends it again
        groups = []
    groups.append((ask(1), await engine.generate(ask(1, n=2, max_tokens=30))))
    for request, group in groups:
        for trajectory in group:
            assert [span.version for span in trajectory.version_spans] == [2]
            expected = full_logprobs(models[2], request, trajectory.token_ids)
            ids = torch.from_numpy(trajectory.token_ids.astype(np.int64))[:, None]
            error = model_rounding(models[2].config, engine.limits.max_positions, expected)
            np.testing.assert_allclose(trajectory.actor_logprobs, expected.gather(1, ids)[:, 0], atol=error, rtol=0)
    await engine.load_weights(4, weights(0), probes[0])
    assert engine.version == 4


async def test_weights_that_are_not_finite_are_refused_and_the_version_at_hand_stays(
    start_engine: StartEngine, load: Load, weights: Weights, ask: Ask
) -> None:
    engine = start_engine()
    before = (await engine.generate(ask()))[0]
    tensors = load_file(weights(1) / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, weights(1) / "model.safetensors")
    with pytest.raises(WeightCorruptError, match=r"'model\.norm\.weight' has NaN or infinite values"):
        await engine.load_weights(1, weights(1))
    assert engine.version == -1
    assert_same(before, (await engine.generate(ask()))[0], load(0))


async def test_logits_that_are_not_finite_fail_requests_and_the_next_version_heals(
    start_engine: StartEngine, weights: Weights, ask: Ask
) -> None:
    engine = start_engine()
    tensors = load_file(weights(1) / "model.safetensors")
    tensors["model.norm.weight"][:] = 3e38  # still a float32; its products are not
    save_file(tensors, weights(1) / "model.safetensors")
    await engine.load_weights(1, weights(1))
    with pytest.raises(EngineError, match=r"version \[1\] give logits that are not finite"):
        await engine.generate(ask(n=2))
    await engine.load_weights(2, weights(2))
    assert len(await engine.generate(ask(n=2))) == 2
    assert engine.status().num_running == engine.status().num_waiting == 0


async def test_a_cancelled_request_frees_its_place(start_engine: StartEngine, ask: Ask, until: Until) -> None:
    engine = start_engine(max_batch_size=4, endless=True)
    running = await run_slowly(engine, ask(0, n=4, max_tokens=120), until)
    waiting = asyncio.create_task(engine.generate(ask(1, n=2, max_tokens=120)))
    await until(lambda: engine.status().num_waiting == 2, "the second request to wait")
    waiting.cancel()
    running.cancel()
    await until(lambda: engine.status().num_running == engine.status().num_waiting == 0, "an empty engine")
    assert running.cancelled() or running.cancelling()
    assert len(await engine.generate(ask(2, n=3))) == 3


async def test_a_full_queue_refuses_and_says_when_to_come_back(
    start_engine: StartEngine, ask: Ask, until: Until
) -> None:
    engine = start_engine(max_batch_size=2, max_queue=5, endless=True)
    running = await run_slowly(engine, ask(0, n=4, max_tokens=120), until)
    with pytest.raises(QueueFullError) as caught:
        await engine.generate(ask(1, n=2))
    assert caught.value.retry_after_seconds > 0
    assert len(await engine.generate(ask(2, n=1))) == 1  # what fits is taken
    assert len(await running) == 4


async def test_more_trajectories_than_fit_at_once_are_all_sampled(start_engine: StartEngine, ask: Ask) -> None:
    engine = start_engine(max_batch_size=3)
    groups = await asyncio.gather(*(engine.generate(ask(i, n=5)) for i in range(3)))
    assert [len(group) for group in groups] == [5, 5, 5]
    status = engine.status()
    assert (status.num_running, status.num_waiting) == (0, 0)
    assert status.tokens_generated == sum(t.num_tokens for group in groups for t in group)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "sampling.temperature = -1.0: is not a number ≥ 0"),
        ({"temperature": float("nan")}, "sampling.temperature = nan: is not a number ≥ 0"),
        ({"max_tokens": 0}, "sampling.max_tokens = 0: asks for no tokens"),
        ({"top_logprobs": 50}, "sampling.top_logprobs = 50: is more than the vocabulary's 49 tokens"),
        ({"stop_token_ids": (49,)}, "sampling.stop_token_ids = 49: is not in the vocabulary of 49 tokens"),
        ({"n": 0}, "num_trajectories = 0: is not between 1 and this server's queue of 256"),
        ({"n": 257}, "num_trajectories = 257: is not between 1 and this server's queue of 256"),
        ({"length": 0}, "prompt_token_ids = []: is empty"),
        ({"length": 117}, "with max_tokens = 12 it exceeds the model's 128 positions. Shorten the prompt, or set"),
    ],
)
async def test_requests_that_cannot_work_are_refused_with_a_remedy(
    start_engine: StartEngine, ask: Ask, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        await start_engine().generate(ask(**changes))
    assert message in str(caught.value)
    assert caught.value.remedy


async def test_tokens_outside_the_vocabulary_are_refused(start_engine: StartEngine, ask: Ask) -> None:
    request = ask()
    request.prompt_token_ids[1] = 4_000_000_000
    with pytest.raises(ConfigError, match="prompt_token_ids = 4000000000: is not in the vocabulary of 49 tokens"):
        await start_engine().generate(request)


async def test_closing_fails_what_is_under_way(start_engine: StartEngine, ask: Ask, until: Until) -> None:
    engine = start_engine(endless=True)
    running = await run_slowly(engine, ask(n=2, max_tokens=120), until)
    await engine.close()
    with pytest.raises(EngineError, match="the engine has stopped"):
        await running
    with pytest.raises(EngineError, match="the engine has stopped"):
        await engine.generate(ask())
    with pytest.raises(EngineError, match="the engine was closed"):
        await engine.wait_failed()
