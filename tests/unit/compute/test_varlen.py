"""Attention by the lengths of sequences: what a layer computes, which models can be switched to it, and the states and
gradients of packed rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import gamma, model_rounding, rounding
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from jackpot.compute.forward import completion_hidden, packed_completion_hidden
from jackpot.compute.model_checks import self_check
from jackpot.compute.model_loading import load_causal_lm
from jackpot.compute.models import hidden_states
from jackpot.compute.packing_trial import packs_exactly, problem_with_varlen
from jackpot.compute.varlen import attend, attends_by_lengths, bounds, is_available, no_mask, switch, switched

MakeModel = Callable[..., Path]

LENGTHS, PROMPTS = (2, 9, 4, 30), (1, 5, 3, 10)
SIZES = {
    "vocab_size": 49,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


FOUR = bounds([4], torch.device("cpu"))


def sequences(lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(3, 40, length) for length in lengths]


def attention_of(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    """[1, L, H, D] float64, written out: softmax over the tokens of the same sequence up to one's own."""
    groups = query.shape[1] // key.shape[1]
    output = torch.zeros_like(query.double())
    first = 0
    for length in lengths:
        for row in range(first, first + length):
            for head in range(query.shape[1]):
                seen = slice(first, row + 1)
                scores = key[0, head // groups, seen].double() @ query[0, head, row].double() * scale
                output[0, head, row] = scores.softmax(0) @ value[0, head // groups, seen].double()
        first += length
    return output.transpose(1, 2)


def attention_rounding(query: Tensor, key: Tensor, value: Tensor, tokens: int, scale: float) -> float:
    """A score is D products and a factor; its error is a relative one of its exponential, and of the sum of them."""
    keys = key.abs().repeat_interleave(query.shape[1] // key.shape[1], 1)
    score = rounding(query.shape[-1] + 1, scale * (query.abs() @ keys.transpose(-1, -2)).max())
    return (2 * score + gamma(2 * tokens)) * float(value.abs().max())


def heads(rows: int, length: int, dim: int = 8, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of four heads, keys and values of two."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, count, length, dim) for count in (4, 2, 2)]
    query, key, value = (torch.randn(shape, generator=generator).to(**settings) for shape in shapes)
    return query, key, value


def test_bounds_are_where_sequences_begin_and_the_last_one_ends() -> None:
    found = bounds([3, 1, 5], torch.device("cpu"))
    assert found["cu_seq_lens_q"].tolist() == [0, 3, 4, 9]
    assert found["cu_seq_lens_q"].dtype == torch.int32
    assert found["cu_seq_lens_k"] is found["cu_seq_lens_q"]
    assert found["max_length_q"] == found["max_length_k"] == 5


@pytest.mark.parametrize("scale", [0.5, 8**-0.5])
def test_each_token_attends_to_its_own_sequence_alone(scale: float) -> None:
    query, key, value = heads(1, 9)
    given = bounds([3, 1, 5], torch.device("cpu"))
    output, weights = attend(torch.nn.Identity(), query, key, value, None, scaling=scale, **given)
    assert weights is None
    expected = attention_of(query, key, value, (3, 1, 5), scale).float()
    torch.testing.assert_close(output, expected, rtol=0, atol=attention_rounding(query, key, value, 5, scale))


def test_without_bounds_every_row_is_a_sequence() -> None:
    query, key, value = heads(3, 4)
    output, _ = attend(torch.nn.Identity(), query, key, value, None, scaling=0.5)
    for row in range(3):
        own = slice(row, row + 1)
        expected = attention_of(query[own], key[own], value[own], (4,), 0.5).float()
        torch.testing.assert_close(output[own], expected, rtol=0, atol=attention_rounding(query, key, value, 4, 0.5))


def test_queries_and_keys_wider_than_values_are_narrowed() -> None:
    query, key, value = heads(1, 4)
    output, _ = attend(torch.nn.Identity(), query, key, value.bfloat16(), None)
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention_mask": torch.ones(1, 1, 4, 4, dtype=torch.bool), **FOUR}, "a mask beside the lengths"),
        ({"sliding_window": 4}, "wants sliding_window"),
        ({"softcap": 50.0}, "wants softcap"),
        ({"s_aux": torch.zeros(4)}, "wants s_aux"),
        ({"dropout": 0.1}, "wants dropout"),
        ({"key": torch.zeros(1, 2, 6, 8), "value": torch.zeros(1, 2, 6, 8)}, "has no cache"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused(changes: dict[str, Any], says: str) -> None:
    query, key, value = heads(1, 4)
    given = {"query": query, "key": key, "value": value, "attention_mask": None, "dropout": 0.0, "use_cache": False}
    attend(torch.nn.Identity(), **given)
    with pytest.raises(ValueError, match=says):
        attend(torch.nn.Identity(), **{**given, **changes})


@pytest.mark.parametrize("dim", [12, 264])
def test_heads_that_the_kernel_does_not_take_are_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"heads have {dim} dimensions"):
        attend(torch.nn.Identity(), *heads(1, 4, dim), None)


def test_a_mask_over_right_padding_is_dropped_and_any_other_refused() -> None:
    assert no_mask(attention_mask=None, batch_size=2) is None
    assert no_mask(attention_mask=torch.tensor([[True] * 3, [True, False, False]])) is None
    with pytest.raises(ValueError, match="Pad rows on the right"):
        no_mask(attention_mask=torch.tensor([[False, True, True]]))


def test_the_kernel_is_for_gpus() -> None:
    assert not is_available(torch.device("cpu"), torch.bfloat16)
    assert not is_available(torch.device("cuda"), torch.float32)


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("packed", [True, False])
def test_states_and_gradients_of_a_switched_model_are_those_it_had(
    make_model: MakeModel, architecture: str, packed: bool
) -> None:
    """Packed in one row, and in padded rows, which are then sequences of their own."""
    model = load_causal_lm(make_model(architecture, seed=3), "float32", "cpu")
    expected = states_and_gradient(model, completion_hidden)
    switch(model)
    assert attends_by_lengths(model)
    found = states_and_gradient(model, packed_completion_hidden if packed else completion_hidden)
    for one, other, backward in zip(found, expected, (False, True), strict=True):
        atol = model_rounding(model.config, max(LENGTHS), other, backward=backward)
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def test_a_switched_model_passes_the_check_of_its_logits(make_model: MakeModel) -> None:
    model = load_causal_lm(make_model("qwen3", seed=3), "float32", "cpu")
    switch(model)
    self_check(model)
    assert packs_exactly(model)


def test_a_switched_model_is_given_lengths_with_positions(make_model: MakeModel) -> None:
    model = load_causal_lm(make_model("qwen3", seed=3), "float32", "cpu")
    ids, positions = torch.arange(3, 9)[None], torch.tensor([[0, 1, 2, 0, 1, 2]])
    with switched(model), pytest.raises(ValueError, match="needs packed_lengths"):
        hidden_states(model, ids, position_ids=positions)
    assert not attends_by_lengths(model)
    hidden_states(model, ids, position_ids=positions)


@pytest.mark.parametrize("states", [completion_hidden, packed_completion_hidden])
def test_completions_share_a_prompts_row_in_a_switched_model(
    make_model: MakeModel, states: Callable[..., Tensor]
) -> None:
    model = load_causal_lm(make_model("qwen3", seed=3), "float32", "cpu")
    siblings = [np.r_[7, 8, 9, own] for own in ([3, 4], [5, 6, 11], [12])]
    alone = completion_hidden(model, siblings, [3, 3, 3])
    with switched(model):
        shared = states(model, siblings, [3, 3, 3], [2, 1])
    torch.testing.assert_close(shared, alone, rtol=0, atol=model_rounding(model.config, 6, alone))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (Qwen3Config(**SIZES, head_dim=8), None),
        (LlamaConfig(**SIZES), None),
        (MistralConfig(**SIZES, sliding_window=None), None),
        (MistralConfig(**SIZES, sliding_window=4), "has layers that do not see the whole context"),
        (Gemma2Config(**SIZES, head_dim=8), "has layers that do not see the whole context"),
        (Gemma2Config(**SIZES, head_dim=8, layer_types=["full_attention"] * 2), "its attention wants softcap"),
        (LlamaConfig(**{**SIZES, "hidden_size": 48}), "its heads have 12 dimensions"),
        (Qwen3Config(**SIZES, head_dim=264), "its heads have 264 dimensions"),
        (
            BloomConfig(vocab_size=49, hidden_size=32, n_layer=2, n_head=4),
            "does not allow another attention implementation",
        ),
        (
            DeepseekV3Config(
                **{**SIZES, "num_key_value_heads": 4},
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=1,
                topk_group=1,
                kv_lora_rank=8,
                q_lora_rank=8,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=8,
            ),
            "16 dimensions for queries and 8 for values",
        ),
    ],
)
def test_a_trial_tells_which_models_can_be_switched(config: PreTrainedConfig, problem: str | None) -> None:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    before = model.config._attn_implementation
    found = problem_with_varlen(model)
    assert found is None if problem is None else problem in str(found)
    assert model.config._attn_implementation == before != "jackpot_varlen"


def test_a_trial_notices_a_model_that_keeps_lengths_to_itself(make_model: MakeModel) -> None:
    model = load_causal_lm(make_model("qwen3", seed=3), "float32", "cpu")
    trunk = model.base_model.forward
    # As an architecture that hands nothing down to its layers would.
    model.base_model.forward = lambda **given: trunk(**{k: v for k, v in given.items() if "_seq_" not in k})
    told = r"Qwen3ForCausalLM lets packed sequences see each other \(hidden states differ by [0-9.]+ of the largest\)"
    assert re.fullmatch(told, str(problem_with_varlen(model)))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dim", [8, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_attends_as_the_loop_in_float32_does_and_so_do_its_gradients(dim: int, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    lengths = (1, 130, 7, 300, 64)
    narrow = heads(1, sum(lengths), dim, device=device, dtype=dtype)
    weight = torch.randn(1, sum(lengths), 4, dim, generator=torch.Generator().manual_seed(1)).to(device)
    given = bounds(lengths, device)
    found = []
    # Float32 copies on the CPU, where the loop is in the kernel's place.
    for place, wide in ((device, dtype), (torch.device("cpu"), torch.float32)):
        inputs = [tensor.detach().to(place, wide).requires_grad_() for tensor in narrow]
        own = {name: value.to(place) if isinstance(value, Tensor) else value for name, value in given.items()}
        output, _ = attend(torch.nn.Identity(), *inputs, None, scaling=dim**-0.5, **own)
        assert output.shape == (1, sum(lengths), 4, dim) and output.dtype == wide
        (output.float() * weight.to(place)).sum().backward()
        found.append([output.detach().float().cpu(), *(tensor.grad.float().cpu() for tensor in inputs)])
    for kernel, loop in zip(*found, strict=True):
        assert distance(kernel, loop) < 0.02


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_packed_bfloat16_has_the_states_and_gradients_of_padded_rows_in_float32(
    make_model: MakeModel, architecture: str, head_dim: int
) -> None:
    """Grouped heads; and padded rows of the switched model, which are sequences of their own."""
    path = make_model(architecture, seed=3, head_dim=head_dim, initializer_range=0.1)
    model = load_causal_lm(path, "bfloat16", "cuda")
    wide = load_causal_lm(path, "bfloat16", "cuda").float()
    assert problem_with_varlen(model) is None  # on a GPU the trial is made with the kernel
    expected = states_and_gradient(wide, completion_hidden)
    rows = states_and_gradient(model, completion_hidden)
    switch(model)
    for states in (packed_completion_hidden, completion_hidden):
        found = states_and_gradient(model, states)
        for mine, theirs, exact in zip(found, rows, expected, strict=True):
            assert distance(mine, exact) < max(0.02, 1.5 * distance(theirs, exact))


def states_and_gradient(model: PreTrainedModel, states: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Float32: of the completions' tokens, [N, H], and of all parameters, [P]."""
    model.zero_grad()
    hidden = states(model, sequences(), PROMPTS)
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden.device)
    (hidden.float() * weight).sum().backward()
    gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return hidden.detach().float(), torch.cat(gradients)


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative: what lies between them, over the length of the second."""
    return float((found - expected).norm() / expected.norm())
