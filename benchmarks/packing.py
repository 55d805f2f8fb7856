"""Forward and backward of sequences of mixed length, laid out in three ways: rows of similar length, one row under a
block-diagonal mask, and one row with attention by lengths.

    python benchmarks/packing.py --device cuda                       # a policy of 0.2 B parameters in bfloat16
    python benchmarks/packing.py --device cuda --pass-tokens 32768   # larger passes
    python benchmarks/packing.py --hidden 64 --layers 2 --heads 4 --kv-heads 2 --head-dim 16 --shortest 8 \\
        --longest 64 --tokens 1024 --pass-tokens 512                 # on a CPU; the third needs a GPU

A random Qwen3 up to its hidden states; lengths are log-uniform. Passes are those that the learner plans. Layouts
alternate; medians over rounds. Tokens per second count real tokens, not padding. Peak memory is what forward and
backward add to parameters and gradients.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from jackpot.compute import varlen
from jackpot.compute.batching import ModelPass
from jackpot.compute.forward import completion_hidden, packed_completion_hidden
from jackpot.compute.packing_trial import problem_with_varlen
from jackpot.compute.ranks.partition import plan_passes
from jackpot.config import LearnerConfig
from jackpot.learner.models.compile_and_checkpoint import compile_and_checkpoint

VOCABULARY = 1024


@dataclass(slots=True)
class Layout:
    """One way to lay the sequences out, and what was measured of it."""

    name: str
    model: PreTrainedModel
    states: Callable[..., Tensor]
    passes: list[ModelPass]
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    failed: str | None = None


def make_policy(options: argparse.Namespace) -> PreTrainedModel:
    config = Qwen3Config(
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim,
        vocab_size=VOCABULARY,
        max_position_embeddings=max(4096, options.longest),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    model: PreTrainedModel = made.to(options.device).eval()
    compile_and_checkpoint(model, LearnerConfig(activation_checkpointing=options.checkpointing))
    return model


def make_sequences(options: argparse.Namespace) -> list[np.ndarray]:
    """Log-uniform lengths, until there are enough tokens."""
    random = np.random.default_rng(0)
    sequences: list[np.ndarray] = []
    while sum(map(len, sequences)) < options.tokens:
        length = int(np.exp(random.uniform(np.log(options.shortest), np.log(options.longest))))
        sequences.append(random.integers(0, VOCABULARY, length))
    return sequences


def make_layouts(options: argparse.Namespace, sequences: list[np.ndarray]) -> list[Layout]:
    model = make_policy(options)
    lengths = [len(sequence) for sequence in sequences]
    in_rows = plan_passes(lengths, options.pass_tokens)
    packed = plan_passes(lengths, options.pass_tokens, packed=True)
    layouts = [
        Layout("rows of similar length", model, completion_hidden, in_rows),
        Layout("packed, block-diagonal mask", model, packed_completion_hidden, packed),
    ]
    if not varlen.is_available(model.device, model.dtype):
        print("packed, by lengths: needs a GPU and half precision")
    elif problem := problem_with_varlen(model):
        print(f"packed, by lengths: {problem}")
    else:
        # The same parameters and gradients under another configuration.
        other = make_policy(options)
        for own, shared in zip(other.parameters(), model.parameters(), strict=True):
            own.data = shared.data
        varlen.switch(other)
        layouts.append(Layout("packed, by lengths", other, packed_completion_hidden, packed))
    return layouts


def run(layout: Layout, sequences: list[np.ndarray]) -> None:
    """Forward and backward over all passes, timed; a layout that needs more memory than there is has failed."""
    on_gpu = layout.model.device.type == "cuda"
    layout.model.zero_grad(set_to_none=False)
    before = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    try:
        for one in layout.passes:
            own = [sequences[row] for row in one.sequences]
            layout.states(layout.model, own, [1] * len(own), one.per_row).float().square().mean().backward()
    except torch.OutOfMemoryError:
        layout.failed = "out of memory"
        torch.cuda.empty_cache()
    if on_gpu:
        torch.cuda.synchronize()
        layout.peak_bytes = torch.cuda.max_memory_allocated() - before
    layout.seconds.append(time.perf_counter() - started)


def report(layouts: list[Layout], sequences: list[np.ndarray], on_gpu: bool) -> None:
    tokens = sum(map(len, sequences))
    first = statistics.median(layouts[0].seconds[1:])
    for layout in layouts:
        padded = sum(max(len(sequences[row]) for row in one.sequences) * len(one.sequences) for one in layout.passes)
        computed = padded if layout is layouts[0] else tokens
        text = f"{layout.name}: {len(layout.passes)} passes, {computed} tokens computed for {tokens}"
        if layout.failed:
            print(f"{text}; {layout.failed}")
            continue
        seconds = statistics.median(layout.seconds[1:])
        memory = f", peak {layout.peak_bytes / 2**20:.0f} MiB" if on_gpu else ""
        print(f"{text}; {tokens / seconds:.0f} tokens/s{memory}, {first / seconds:.2f}× rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--shortest", type=int, default=64)
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=32768, help="of all sequences together")
    parser.add_argument("--pass-tokens", type=int, default=16384, help="learner.max_batch_tokens")
    parser.add_argument("--checkpointing", action="store_true", help="learner.activation_checkpointing")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sequences = make_sequences(options)
    layouts = make_layouts(options, sequences)
    on_gpu = torch.device(options.device).type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{name}, torch {torch.__version__}, {options.dtype}, {len(sequences)} sequences of {options.shortest} to "
          f"{options.longest} tokens")  # fmt: skip
    for _ in range(options.rounds + 1):  # the first is not counted
        for layout in layouts:
            if layout.failed is None:
                run(layout, sequences)
    report(layouts, sequences, on_gpu)


if __name__ == "__main__":
    main()
