"""Forward and backward of a policy whose groups share the prompt's row, against completions that stand alone.

    python benchmarks/shared_prompts.py [--width 256] [--layers 4]        # a CPU, one thread
    python benchmarks/shared_prompts.py --device cuda --dtype bfloat16 --width 2048 --layers 4 --heads 16 \\
        --kv-heads 8 --head-dim 128 --batch-tokens 32768 --lengths 64,64 300,1000 4000,500    # Qwen3 1.7B's blocks

A random Qwen3, groups of 8. What stands alone does so as the learner has it: in rows of about the same length, or,
where attention goes by lengths, one after the other. For each pair of prompt and completion lengths: the time alone,
then, as a part of it, that of rows with two, four and eight completions, and which the planner would choose. Layouts
alternate; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from jackpot.compute.batching import ModelPass, Siblings, passes_of_rows, plan_rows, shared_rows
from jackpot.compute.pass_layout import PassLayout, layout_of
from jackpot.compute.ranks.partition import plan_packed

GROUP_SIZE, VOCABULARY = 8, 256
PER_ROW = (2, 4, 8)


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Completions of one length behind prompts of one length."""

    prompt: int
    own: int
    sequences: list[np.ndarray]
    siblings: Siblings

    @property
    def lengths(self) -> list[int]:
        return [len(sequence) for sequence in self.sequences]


def make_policy(options: argparse.Namespace) -> PreTrainedModel:
    config = Qwen3Config(
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim or options.width // options.heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=32768,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    return model.to(options.device).eval()


def make_groups(prompt: int, own: int, batch_tokens: int, layout: PassLayout) -> Groups:
    assert layout.attention is not None
    random = np.random.default_rng(0)
    count = max(1, batch_tokens // (GROUP_SIZE * (prompt + own)))
    texts = [random.integers(0, VOCABULARY, prompt) for _ in range(count)]
    sequences = [np.r_[text, random.integers(0, VOCABULARY, own)] for text in texts for _ in range(GROUP_SIZE)]
    numbers = np.repeat(np.arange(count), GROUP_SIZE).tolist()
    return Groups(prompt, own, sequences, Siblings(numbers, [prompt] * len(sequences), layout.attention))


def passes_with(groups: Groups, per_row: int, layout: PassLayout, most_tokens: int) -> list[ModelPass]:
    """Passes whose rows hold so many completions each."""
    if per_row == 1:
        return (plan_packed if layout.packed else plan_rows)(groups.lengths, most_tokens)
    rows = [list(range(start, start + per_row)) for start in range(0, len(groups.sequences), per_row)]
    return passes_of_rows(rows, groups.lengths, most_tokens, groups.siblings)


def seconds(model: PreTrainedModel, layout: PassLayout, groups: Groups, passes: Sequence[ModelPass]) -> float:
    """Of forward and backward over all passes."""
    synchronize = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    model.zero_grad()
    synchronize()
    started = time.perf_counter()
    for one in passes:
        own = [groups.sequences[index] for index in one.sequences]
        layout.states(model, own, [groups.prompt] * len(own), one.per_row).sum().backward()
    synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, help="default: width over heads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="of all completions alone (default 4096)")
    parser.add_argument("--pass-tokens", type=int, default=16384, help="most of a pass (default 16384)")
    parser.add_argument("--lengths", nargs="+", default=["16,16", "64,16", "64,64", "64,256", "256,64", "256,256"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = make_policy(options)
    layout = layout_of("auto", [(model, model.dtype)], torch.device(options.device))
    assert layout.attention is not None
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU, one thread"
    attention = layout.attention
    print(f"{where}, torch {torch.__version__}; κ {attention.tokens:.0f}, mask factor {attention.mask_factor:g}")
    alone = "one after the other" if layout.packed else "in rows"
    print(f"| prompt, completion | tokens alone, {alone} | ms | two a row | four | eight | planned |")
    print("| --- " * 7 + "|", flush=True)
    for prompt, own in (map(int, pair.split(",")) for pair in options.lengths):
        groups = make_groups(prompt, own, options.batch_tokens, layout)
        plans = [passes_with(groups, per_row, layout, options.pass_tokens) for per_row in (1, *PER_ROW)]
        rounds = [[seconds(model, layout, groups, plan) for plan in plans] for _ in range(options.rounds + 1)][1:]
        parts = [statistics.median(row[place] / row[0] for row in rounds) for place in range(1, len(plans))]
        rows = shared_rows(groups.lengths, groups.siblings, options.pass_tokens)
        cells = [
            f"{prompt}, {own}",
            sum(groups.lengths),
            f"{1000 * statistics.median(row[0] for row in rounds):.1f}",
            *(f"{part:.2f}" for part in parts),
            max(map(len, rows)),
        ]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
