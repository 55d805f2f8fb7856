"""What the host does for a block in a pass, forward and backward: plain, through FSDP, and through a computing copy.

    python benchmarks/host_time.py [--layers 28] [--rounds 20]

A random Qwen3 so small that arithmetic takes next to no time, on one thread of the CPU: what is left is the time in
which a GPU's work would be launched, without what the launches themselves take. Variants alternate; medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from jackpot.compute import varlen
from jackpot.compute.forward import packed_completion_hidden
from jackpot.compute.model_loading import load_causal_lm, quiet
from jackpot.compute.ranks.group import join_ranks, leave_ranks
from jackpot.compute.ranks.loading import load_on_ranks
from jackpot.compute.ranks.sharding import release, shard
from jackpot.config import LearnerConfig
from jackpot.learner.models.mixed_precision import MixedPrecisionCopy, in_dtype

SEQUENCE = np.arange(3, 7)


def variants(layers: int) -> dict[str, PreTrainedModel]:
    """Models that compute in bfloat16, all of one architecture."""
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as directory, quiet():
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        ranks = join_ranks("learner", LearnerConfig(), cpu)
        sharded = load_on_ranks(directory, "float32", ranks, cpu, field="model")
        shard(sharded, ranks, "bfloat16", field="model")
        plain, master = (load_causal_lm(directory, "float32", "cpu", field="model") for _ in range(2))
    return {
        "plain bfloat16": in_dtype(plain, torch.bfloat16),
        "FSDP, one rank": sharded,
        "computing copy": MixedPrecisionCopy(master, torch.bfloat16).computing,
    }


def seconds(model: PreTrainedModel) -> tuple[float, float]:
    """Of one forward and one backward pass."""
    started = time.perf_counter()
    states = packed_completion_hidden(model, [SEQUENCE], [1])
    between = time.perf_counter()
    states.square().sum().backward()
    release(model)
    return between - started, time.perf_counter() - between


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = variants(options.layers)
    for model in models.values():
        varlen.switch(model)
    rounds = [[seconds(model) for model in models.values()] for _ in range(options.rounds + 3)][3:]
    print("| a block, ms | forward | backward | both, of plain |")
    print("| --- | --- | --- | --- |")
    for place, name in enumerate(models):
        forward, backward = (
            1000 * statistics.median(row[place][half] for row in rounds) / options.layers for half in (0, 1)
        )
        ratio = statistics.median(sum(row[place]) / sum(row[0]) for row in rounds)
        print(f"| {name} | {forward:.2f} | {backward:.2f} | {ratio:.2f} |")
    leave_ranks()


if __name__ == "__main__":
    main()
