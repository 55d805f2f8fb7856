"""Completions behind one prompt in a row have the states, and give the gradients, of rows of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tolerances import model_rounding, rounding
from transformers import AutoModelForCausalLM, FalconConfig, MistralConfig, PreTrainedModel

from jackpot.compute.batching import AttentionCost
from jackpot.compute.forward import completion_hidden, packed_completion_hidden
from jackpot.compute.model_checks import self_check
from jackpot.compute.model_loading import load_causal_lm
from jackpot.compute.models import output_head
from jackpot.compute.shared_prompts import attention_cost
from jackpot.rollout.transformers.decode_check import check_decoding

CPU = torch.device("cpu")
PROMPTS, OWN = (5, 5, 5, 1, 8, 8), (4, 1, 6, 3, 2, 9)  # tokens of each sequence
PER_ROW = (3, 1, 2)


def sequences() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    prompts = {length: random.integers(3, 40, length) for length in PROMPTS}
    return [np.r_[prompts[p], random.integers(3, 40, t)] for p, t in zip(PROMPTS, OWN, strict=True)]


def alone(model: PreTrainedModel) -> torch.Tensor:
    """Each sequence in a pass of its own: no padding, no mask."""
    return torch.cat([completion_hidden(model, [s], [p]) for s, p in zip(sequences(), PROMPTS, strict=True)])


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_states_and_gradients_are_those_of_sequences_alone(make_model: Any, architecture: str) -> None:
    model = load_causal_lm(make_model(architecture, seed=3), "float32", "cpu")
    weight = torch.randn(sum(OWN), model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    found = []
    for shared in (False, True):
        model.zero_grad()
        hidden = completion_hidden(model, sequences(), PROMPTS, PER_ROW) if shared else alone(model)
        (hidden * weight).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((hidden.detach(), gradient))
    for one, other, backward in zip(found[1], found[0], (False, True), strict=True):
        atol = model_rounding(model.config, max(PROMPTS) + max(OWN), other, backward=backward)
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def test_the_model_reads_each_prompt_once_a_row(make_model: Any) -> None:
    model = load_causal_lm(make_model("qwen3", seed=3), "float32", "cpu")
    shapes = []
    hook = model.base_model.layers[0].register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape[:2]))
    completion_hidden(model, sequences(), PROMPTS, PER_ROW)
    hook.remove()
    assert shapes == [(3, 8 + (2 - 1) + (9 - 1))]  # the longest row: its prompt, and completions without last tokens


def test_kappa_is_the_ratio_of_the_operations(make_model: Any) -> None:
    model = load_causal_lm(
        make_model("llama", seed=3, hidden_size=64, intermediate_size=256, num_hidden_layers=3), "float32", "cpu"
    )
    # Per layer: queries and output 64 × 64 each, keys and values 64 × 32 each, gate, up and down 64 × 256 each, norms.
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 256 + 2 * 64
    cost = attention_cost([model], CPU)
    assert cost is not None and cost.mask_factor == 1.0
    assert cost.tokens == pytest.approx((3 * layer + 64) / (2 * 3 * 64))
    on_gpu = attention_cost([model], torch.device("cuda"))  # where it would compute: nothing is put there
    assert on_gpu == AttentionCost(cost.tokens, mask_factor=2.0)


def test_a_model_that_takes_no_mask_of_ours_gives_every_completion_a_row_and_is_served() -> None:
    """Falcon with ALiBi computes its biases from a mask of rows and columns."""
    config = FalconConfig(
        vocab_size=49, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.4, alibi=True
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    self_check(model)
    check_decoding(model)
    assert attention_cost([model], CPU) is None
    with torch.no_grad():
        plain = [
            model(input_ids=torch.from_numpy(sequence[None, :-1])).logits[0, prompt - 1 :]
            for sequence, prompt in zip(sequences(), PROMPTS, strict=True)
        ]
        expected = torch.cat(plain)
        config.intermediate_size = config.ffn_hidden_size  # the name that the bound knows
        bound = model_rounding(config, max(PROMPTS) + max(OWN), expected)
        for states in (completion_hidden, packed_completion_hidden):
            found = output_head(model).logits(states(model, sequences(), PROMPTS))
            torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_a_model_with_a_window_or_another_attention_gives_every_completion_a_row(make_model: Any) -> None:
    model = load_causal_lm(make_model("llama", seed=3), "float32", "cpu")
    assert attention_cost([model], CPU) is not None
    model.set_attn_implementation("eager")
    assert attention_cost([model], CPU) is None
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    mistral = {"num_key_value_heads": 2, "vocab_size": 50, **sizes}
    for window, shares in ((4, False), (None, True)):
        config = MistralConfig(**mistral, sliding_window=window)
        assert (attention_cost([AutoModelForCausalLM.from_config(config).eval()], CPU) is not None) == shares


def test_a_model_that_lets_siblings_see_each_other_gives_every_completion_a_row(make_model: Any) -> None:
    model = load_causal_lm(make_model("llama", seed=3), "float32", "cpu")
    trunk = model.base_model.forward
    # As an architecture that makes its own mask would.
    model.base_model.forward = lambda **given: trunk(**{**given, "attention_mask": None})
    assert attention_cost([model], CPU) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_on_a_gpu(make_model: Any, dtype: str) -> None:
    model = load_causal_lm(make_model("qwen3", seed=3), dtype, "cuda")
    cost = attention_cost([model], torch.device("cuda"))
    assert cost is not None and cost.mask_factor > 1.0
    shared, expected = completion_hidden(model, sequences(), PROMPTS, PER_ROW), alone(model)
    # In 16 bits states are rounded some twelve times in each of two layers.
    exact = model_rounding(model.config, max(PROMPTS) + max(OWN), expected)
    atol = exact if dtype == "float32" else rounding(2 * 12, expected, torch.bfloat16)
    torch.testing.assert_close(shared.float(), expected.float(), rtol=0, atol=atol)
