"""Rows of all ages change weights together: each token is drawn from the version that it names."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tolerances import model_rounding
from transformers import PreTrainedModel

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
