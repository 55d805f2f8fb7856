"""Rows of all ages change weights together: each token is drawn from the version that it names."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tolerances import model_rounding, rounding
from transformers import PreTrainedModel

from jackpot.compute.models import hidden_states, output_head
from jackpot.rollout.engine import GroupRequest
from jackpot.rollout.transformers import decode_batch
from jackpot.rollout.transformers.decode_batch import DecodeBatch
from jackpot.rollout.transformers.rows import Row


@pytest.mark.parametrize("pass_tokens", [8192, 24, 3])
def test_weights_change_under_rows_that_joined_at_different_times(
    load: Callable[[int], PreTrainedModel],
    ask: Callable[..., GroupRequest],
    full_logprobs: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    pass_tokens: int,
) -> None:
    """Prompts of 1 to 11 tokens; siblings; rows with 5, 2 and no tokens so far, in one pass or in many."""
    monkeypatch.setattr(decode_batch, "PREFILL_TOKENS", pass_tokens)
    model, other = load(0), load(3)
    batch = DecodeBatch(model, eos_ids=())
    joining = [
        [ask(0, length=5, n=2), ask(1, length=9, n=1)],
        [ask(2, length=2, n=3)],
        [ask(3, length=1, n=2), ask(4, length=11, n=1)],
    ]
    requests = [request for wave in joining for request in wave]
    finished = []
    with torch.inference_mode():
        for wave, steps in zip(joining, (3, 2, 0), strict=True):
            batch.add([Row(request, index, [(0, 0)]) for request in wave for index in range(request.num_trajectories)])
            for _ in range(steps):
                assert not batch.step()
        model.load_state_dict(other.state_dict())
        positions: list[int] = []
        watch = model.base_model.register_forward_pre_hook(
            lambda _, __, inputs: (
                positions.append(int(inputs["position_ids"].max())) if "position_ids" in inputs else None
            ),
            with_kwargs=True,
        )
        batch.change_version(3)
        watch.remove()
        # The last input of the row that has the most: padding of no row is placed behind what the model may know.
        assert max(positions) == 9 + 5 - 2
        while batch.rows:
            finished += batch.step()
    versions = {0: load(0), 3: other}
    assert len(finished) == sum(request.num_trajectories for request in requests) == 9
    for row, trajectory in finished:
        sampled = {0: 5, 1: 5, 2: 2, 3: 0, 4: 0}[requests.index(row.request)]
        spans = [(span.version, span.start, span.end) for span in trajectory.version_spans]
        assert spans == [(0, 0, sampled)] * bool(sampled) + [(3, sampled, 12)]
        for version, start, end in spans:
            whole = full_logprobs(versions[version], row.request, trajectory.token_ids)
            ids = torch.from_numpy(trajectory.token_ids.astype(np.int64))[:, None]
            expected = whole.gather(1, ids)[start:end, 0].numpy()
            error = model_rounding(model.config, 11 + 12, whole)
            np.testing.assert_allclose(trajectory.actor_logprobs[start:end], expected, atol=error, rtol=0)


def test_in_bfloat16_logits_are_accumulated_and_kept_in_float32(
    load: Callable[[int], PreTrainedModel], ask: Callable[..., GroupRequest]
) -> None:
    """Blocks that add nothing leave hidden states that are the same bits in every pass: all error is the head's."""
    model = load(0).to(torch.bfloat16)
    for layer in model.model.layers:
        for added in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.zeros_(added.weight)
    head = output_head(model).weight.detach()
    request = ask(0, length=5, n=8, temperature=1.0)
    batch = DecodeBatch(model, eos_ids=())
    finished = []
    with torch.inference_mode():
        batch.add([Row(request, index, [(0, 0)]) for index in range(8)])
        while batch.rows:
            finished += batch.step()
        for _, trajectory in finished:
            ids = torch.from_numpy(np.concatenate([request.prompt_token_ids[-1:], trajectory.token_ids]).astype(int))
            hidden = hidden_states(model, ids[None, :-1])[0]
            exact = torch.log_softmax(hidden.double() @ head.double().T, dim=-1)
            rounded = torch.log_softmax((hidden @ head.T).float(), dim=-1)
            chosen, sampled = ids[1:, None], torch.from_numpy(trajectory.actor_logprobs)
            # The products' sum, the exponentials' sum, and the temperature's division, exponential and logarithm.
            magnitude = (hidden.double().abs() @ head.double().abs().T).max() + exact.abs().max()
            bound = 2 * rounding(hidden.shape[1] + len(head) + 4, magnitude)
            assert float((sampled - exact.gather(1, chosen)[:, 0]).abs().max()) <= bound
            assert float((rounded.double() - exact).abs().max()) > 10 * bound
