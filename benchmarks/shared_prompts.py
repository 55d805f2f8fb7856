"""Forward and backward of a policy whose groups share the prompt's row, against a row for every completion.

    python benchmarks/shared_prompts.py [--width 256] [--layers 4] [--rounds 5] [--device cuda --dtype bfloat16]

A random Qwen3 of the given size, groups of 8, one thread. The rows are those that the learner's planner chooses; the
time that it foresees stands beside the one measured. The two layouts alternate.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from jackpot.runtime.batching import ModelPass, Siblings, plan_rows
from jackpot.runtime.forward import completion_hidden
from jackpot.runtime.shared_prompts import attention_tokens

GROUP_SIZE, VOCABULARY = 8, 256
LENGTHS = [(16, 16), (64, 16), (64, 64), (64, 256), (256, 64), (256, 256)]  # prompt, completion
BATCH_TOKENS = 4096


def make_policy(width: int, layers: int, device: str, dtype: str) -> PreTrainedModel:
    config = Qwen3Config(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).to(device).eval()
    return model


def seconds(model: PreTrainedModel, sequences: list[np.ndarray], prompts: list[int], passes: list[ModelPass]) -> float:
    """Of forward and backward over all passes."""
    synchronize = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    for one in passes:
        own = [sequences[index] for index in one.sequences]
        completion_hidden(model, own, [prompts[index] for index in one.sequences], one.per_row).sum().backward()
    synchronize()
    return time.perf_counter() - started


def work(passes: list[ModelPass], prompt: int, own: int, kappa: float) -> float:
    """What the planner foresees, in tokens."""
    rows = [(prompt + count * own, 1 if count > 1 else 0.5) for one in passes for count in one.per_row]
    return sum(tokens + share * tokens**2 / kappa for tokens, share in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = make_policy(options.width, options.layers, options.device, options.dtype)
    kappa = attention_tokens(model)
    assert kappa is not None
    print(f"width {options.width}, {options.layers} layers, kappa {kappa:.0f} tokens")
    random = np.random.default_rng(0)
    for prompt, own in LENGTHS:
        groups = max(1, BATCH_TOKENS // (GROUP_SIZE * (prompt + own)))
        texts = [random.integers(0, VOCABULARY, prompt) for _ in range(groups)]
        sequences = [np.r_[text, random.integers(0, VOCABULARY, own)] for text in texts for _ in range(GROUP_SIZE)]
        numbers = np.repeat(np.arange(groups), GROUP_SIZE).tolist()
        prompts, lengths = [prompt] * len(sequences), [prompt + own] * len(sequences)
        apart = plan_rows(lengths, 16384)
        shared = plan_rows(lengths, 16384, Siblings(numbers, prompts, kappa))
        ratios = []
        for _ in range(options.rounds + 1):
            model.zero_grad()
            ratios.append(seconds(model, sequences, prompts, apart) / seconds(model, sequences, prompts, shared))
        foreseen = work(apart, prompt, own, kappa) / work(shared, prompt, own, kappa)
        print(
            f"prompt {prompt}, completion {own}: rows of {max(max(one.per_row) for one in shared)}, "
            f"{statistics.median(ratios[1:]):.2f}× as fast (foreseen {foreseen:.2f}×)",
            flush=True,
        )


if __name__ == "__main__":
    main()
