"""Drawing tokens: reproducible numbers in, the right token and its log-probability out."""

from __future__ import annotations

import math

import numpy as np
import torch

from jackpot.rollout.transformers.sampling import draw_tokens, trajectory_uniforms


def test_uniforms_depend_on_seed_and_index_alone() -> None:
    first = trajectory_uniforms(7, 0, 1000)
    assert np.array_equal(first, trajectory_uniforms(7, 0, 1000))
    assert np.array_equal(first[:10], trajectory_uniforms(7, 0, 10))  # and not on the length
    assert not np.array_equal(first, trajectory_uniforms(7, 1, 1000))
    assert not np.array_equal(first, trajectory_uniforms(2**64 - 1, 0, 1000))
    assert first.dtype == np.float32
    assert first.min() >= 0
    assert first.max() < 1
    assert abs(first.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 1000)


def test_a_token_is_where_the_cumulative_distribution_passes_the_number() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]])).expand(4, 3)
    drawn = draw_tokens(logits, torch.ones(4), torch.tensor([0.0, 0.49, 0.51, 0.76]), 2, any_greedy=False)
    assert drawn.tokens.tolist() == [0, 0, 1, 2]
    torch.testing.assert_close(drawn.logprobs.exp(), torch.tensor([0.5, 0.5, 0.25, 0.25]))
    assert drawn.topk_ids[:, 0].tolist() == [0] * 4
    torch.testing.assert_close(drawn.topk_logprobs.exp(), torch.tensor([[0.5, 0.25]]).expand(4, 2))


def test_temperature_reshapes_what_is_drawn_from_and_what_is_reported() -> None:
    logits = torch.log(torch.tensor([[0.8, 0.2]])).expand(2, 2)
    drawn = draw_tokens(logits, torch.tensor([1.0, 0.5]), torch.tensor([0.9, 0.9]), 0, any_greedy=False)
    assert drawn.tokens.tolist() == [1, 0]  # at temperature 1/2: 0.64 / (0.64 + 0.04) = 0.941
    torch.testing.assert_close(drawn.logprobs.exp(), torch.tensor([0.2, 0.64 / 0.68]))
    assert drawn.topk_ids.shape == (2, 0)


def test_impossible_tokens_are_never_drawn_however_extreme_the_number() -> None:
    inf = float("inf")
    logits = torch.tensor([[-inf, 0.0, 1.0, -inf]]).expand(2, 4)
    drawn = draw_tokens(logits, torch.ones(2), torch.tensor([0.0, 1 - 2**-24]), 0, any_greedy=False)
    assert drawn.tokens.tolist() == [1, 2]


def test_rounding_in_a_large_vocabulary_stays_inside_it() -> None:
    logits = torch.randn(64, 50_000, generator=torch.Generator().manual_seed(0))
    largest = torch.full((64,), 1 - 2**-24)
    drawn = draw_tokens(logits, torch.full((64,), 0.7), largest, 0, any_greedy=False)
    assert drawn.tokens.max() < 50_000
    assert torch.isfinite(drawn.logprobs).all()


def test_greedy_rows_stand_beside_sampled_ones() -> None:
    logits = torch.log(torch.tensor([[0.6, 0.4], [0.6, 0.4]]))
    drawn = draw_tokens(logits, torch.tensor([0.0, 1.0]), torch.tensor([0.99, 0.99]), 1, any_greedy=True)
    assert drawn.tokens.tolist() == [0, 1]
    torch.testing.assert_close(drawn.logprobs.exp(), torch.tensor([0.6, 0.4]))  # greedy: of temperature 1
