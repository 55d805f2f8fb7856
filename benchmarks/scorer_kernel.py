"""The scoring kernel against the plain way: logits of all tokens at once, then log_softmax.

    python benchmarks/scorer_kernel.py [--tokens 2048] [--vocabulary 151936] [--hidden 512] [--threads 1]

Peak memory is that of a process of its own per variant; times come from one process in which the variants take
turns, so that a busy machine slows all of them alike; CPU seconds leave
waiting for a core out. Linux only (peak memory is read from /proc).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jackpot.algorithm.output_head import DEFAULT_CHUNK_TOKENS, OutputHead
from jackpot.algorithm.vocabulary import token_logprobs

TOP_K = 20
Pass = Callable[[], object]


def make_inputs(options: argparse.Namespace) -> tuple[Tensor, OutputHead, Tensor]:
    """Hidden states [T, H], output head [V, H] and sampled ids [T] of no particular model."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(options.tokens, options.hidden, generator=generator)
    weight = torch.randn(options.vocabulary, options.hidden, generator=generator).div_(options.hidden**0.5)
    ids = torch.randint(options.vocabulary, (options.tokens,), generator=generator)
    return hidden, OutputHead(weight), ids


def make_passes(options: argparse.Namespace) -> dict[str, Pass]:
    """The variants by name."""
    hidden, head, ids = make_inputs(options)

    def plain(top_k: int) -> object:
        logprobs = torch.log_softmax(hidden @ head.weight.t(), dim=-1)
        return logprobs.gather(1, ids[:, None]), logprobs.topk(top_k) if top_k else None

    def sliced(top_k: int) -> object:
        return token_logprobs(hidden, head, ids, chunk_tokens=options.chunk_tokens, top_k=top_k)

    return {
        "plain": lambda: plain(0),
        "sliced": lambda: sliced(0),
        f"plain, top {TOP_K}": lambda: plain(TOP_K),
        f"sliced, top {TOP_K}": lambda: sliced(TOP_K),
    }


def peak_bytes() -> int:
    """The greatest resident memory that this process has had."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def measure_memory(options: argparse.Namespace) -> dict[str, int]:
    """Peak of this process with one pass of one variant, and before it (libraries and inputs)."""
    variant = make_passes(options)[options.variant]
    before = peak_bytes()
    variant()
    return {"before": before, "peak": peak_bytes()}


def measure_times(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Median wall and CPU seconds of each variant over rounds in which all take their turn."""
    passes = make_passes(options)
    wall: dict[str, list[float]] = {name: [] for name in passes}
    cpu: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(options.rounds):
        for name, run in passes.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - cpu_start)
    return {name: (statistics.median(wall[name]), statistics.median(cpu[name])) for name in passes}


def in_subprocess(measurement: str, variant: str = "") -> dict[str, Any]:
    """One measurement in a process of its own, with this one's arguments."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", measurement, "--variant", variant]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output))


def report(options: argparse.Namespace) -> None:
    """Print the table."""
    names = ["plain", "sliced", f"plain, top {TOP_K}", f"sliced, top {TOP_K}"]
    memory = {name: in_subprocess("memory", name) for name in names}
    seconds = in_subprocess("time")
    print(
        f"{options.tokens} tokens, vocabulary {options.vocabulary}, hidden {options.hidden}, float32, "
        f"{options.threads} thread(s), slices of {options.chunk_tokens} tokens, median of {options.rounds}"
    )
    print(
        f"{'variant':<16}{'peak GB':>9}{'ratio':>8}{'added GB':>10}{'ratio':>8}{'seconds':>10}{'ratio':>8}"
        f"{'CPU s':>8}{'ratio':>8}"
    )
    for name in names:
        base = name.replace("sliced", "plain")
        peak, added = memory[name]["peak"], memory[name]["peak"] - memory[name]["before"]
        base_peak, base_added = memory[base]["peak"], memory[base]["peak"] - memory[base]["before"]
        print(
            f"{name:<16}{peak / 1e9:>9.2f}{peak / base_peak:>8.2f}{added / 1e9:>10.2f}{added / base_added:>8.2f}"
            f"{seconds[name][0]:>10.2f}{seconds[name][0] / seconds[base][0]:>8.2f}"
            f"{seconds[name][1]:>8.2f}{seconds[name][1] / seconds[base][1]:>8.2f}"
        )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--chunk-tokens", type=int, default=DEFAULT_CHUNK_TOKENS)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--measure", choices=("memory", "time"), help=argparse.SUPPRESS)
    parser.add_argument("--variant", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    match options.measure:
        case "memory":
            print(json.dumps(measure_memory(options)))
        case "time":
            print(json.dumps(measure_times(options)))
        case _:
            report(options)


if __name__ == "__main__":
    main()
