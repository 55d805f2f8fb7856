"""The vocabulary pass, forward and backward, against log_softmax of whole rows, Liger's and cut-cross-entropy's.

    python benchmarks/vocabulary_pass.py [--vocabulary 32000 151936] [--tokens 1024] [--hidden 256] [--device cpu]

Each variant gives log-probabilities of sampled tokens, and with backward the gradients of hidden states and weight for
a weighted sum of them (Liger's GRPO loss: the same gradients, found in its forward pass). Peak memory is that of a
process of its own per variant; times come from one process per vocabulary in which the variants take turns. On a GPU
the rate is shown as a part of that of one 16-bit matrix product of hidden states and weight.

Liger and cut-cross-entropy are tried if they are installed (`pip install --no-deps liger-kernel cut-cross-entropy
triton`); what cannot run says so.
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

from jackpot.algorithm.output_head import OutputHead
from jackpot.algorithm.vocabulary import differentiable_token_logprobs, token_logprobs

NAMES = ("whole rows", "jackpot", "liger (GRPO loss)", "cut-cross-entropy")
SEQUENCES = 8  # Liger goes sequence by sequence
Pass = Callable[[], object]


class Inputs:
    """Hidden states [T, H], weight [V, H], sampled ids [T] and a factor for each [T], of no particular model."""

    def __init__(self, options: argparse.Namespace, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        device, dtype = options.device, torch.bfloat16 if options.device == "cuda" else torch.float32
        hidden = torch.randn(options.tokens, options.hidden, generator=generator)
        weight = torch.randn(vocabulary, options.hidden, generator=generator).div_(options.hidden**0.5)
        self.hidden = hidden.to(device, dtype).requires_grad_()
        self.weight = weight.to(device, dtype).requires_grad_()
        self.ids = torch.randint(vocabulary, (options.tokens,), generator=generator).to(device)
        self.factors = torch.randn(options.tokens, generator=generator).to(device)

    def backward(self, logprobs: Tensor) -> None:
        """Gradients, and away with them."""
        (logprobs * self.factors).sum().backward()
        self.hidden.grad = self.weight.grad = None


def make_pass(name: str, inputs: Inputs, *, backward: bool) -> Pass:
    """A variant.

    Raises:
        ImportError: it is not installed.
        NotImplementedError: it has no such pass.
    """
    logprobs: Callable[[], Tensor]
    if name == "whole rows":

        def logprobs() -> Tensor:
            rows = (inputs.hidden @ inputs.weight.t()).float().log_softmax(-1)
            return rows.gather(1, inputs.ids[:, None])[:, 0]

    elif name == "jackpot":
        if not backward:
            return lambda: token_logprobs(inputs.hidden, OutputHead(inputs.weight), inputs.ids)

        def logprobs() -> Tensor:
            return differentiable_token_logprobs(inputs.hidden, OutputHead(inputs.weight), inputs.ids).logprobs

    elif name == "cut-cross-entropy":
        from cut_cross_entropy import linear_cross_entropy

        kernel = "cce" if inputs.hidden.is_cuda else "torch_compile"

        def logprobs() -> Tensor:
            return -linear_cross_entropy(inputs.hidden, inputs.weight, inputs.ids, impl=kernel, reduction="none")

    else:
        return _liger(inputs, backward=backward)
    if backward:
        return lambda: inputs.backward(logprobs())

    def forward() -> None:
        with torch.no_grad():
            logprobs()

    return forward


def _liger(inputs: Inputs, *, backward: bool) -> Pass:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    if not backward:
        raise NotImplementedError("has no forward pass alone")
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=inputs.hidden.is_cuda)
    length = len(inputs.hidden) // SEQUENCES
    ids, mask = inputs.ids.view(SEQUENCES, length), torch.ones(SEQUENCES, length, device=inputs.ids.device)
    advantages = inputs.factors[:SEQUENCES]

    def run() -> None:
        loss(inputs.hidden.view(SEQUENCES, length, -1), inputs.weight, ids, mask, advantages)[0].backward()
        inputs.hidden.grad = inputs.weight.grad = None

    return run


def peak_bytes(device: str) -> int:
    """The greatest memory that this process has had: resident, or on the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def measure_memory(options: argparse.Namespace, vocabulary: int, name: str, *, backward: bool) -> dict[str, Any]:
    """Bytes that one pass adds to this process's peak."""
    inputs = Inputs(options, vocabulary)
    try:
        # A tiny pass first: libraries, threads and compilers take memory once, which is no matter of size.
        small = argparse.Namespace(**vars(options) | {"tokens": 16})
        make_pass(name, Inputs(small, 64), backward=backward)()
        run = make_pass(name, inputs, backward=backward)
        before = peak_bytes(options.device)
        run()
    except Exception as error:  # whatever another library cannot do here is told in the table
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:80]}
    return {"added": peak_bytes(options.device) - before}


def measure_times(options: argparse.Namespace, vocabulary: int) -> dict[str, float]:
    """Median seconds of each pass over rounds in which all take their turn; the first, which compiles, apart."""
    inputs = Inputs(options, vocabulary)
    passes: dict[str, Pass] = {}
    for name in NAMES:
        for backward in (False, True):
            try:
                run = make_pass(name, inputs, backward=backward)
                run()
            except Exception:  # the memory table says what it was
                continue
            passes[f"{name}|{backward}"] = run
    if options.device == "cuda":
        passes["product|False"] = lambda: inputs.hidden.detach() @ inputs.weight.detach().t()
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(options.rounds):
        for name, run in passes.items():
            started = time.perf_counter()
            run()
            if options.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def in_subprocess(*arguments: str) -> dict[str, Any]:
    """One measurement in a process of its own, with this one's arguments."""
    command = [sys.executable, __file__, *sys.argv[1:], *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def report(options: argparse.Namespace) -> None:
    """Print the table."""
    for vocabulary in options.vocabulary:
        print(f"{options.tokens} tokens, hidden {options.hidden}, vocabulary {vocabulary}, {options.device}")
        seconds = in_subprocess("--measure", "time", "--only", str(vocabulary))
        for backward in (False, True):
            for name in NAMES:
                memory = in_subprocess(
                    "--measure", "memory", "--only", str(vocabulary), "--name", name, *(["--backward"] * backward)
                )
                label = f"  {'forward + backward' if backward else 'forward':<20}{name:<20}"
                key = f"{name}|{backward}"
                if "error" in memory or key not in seconds:
                    print(f"{label}does not run here: {memory.get('error')}", flush=True)
                    continue
                ratio = seconds[key] / seconds[f"whole rows|{backward}"]
                rate = (
                    f"  {seconds['product|False'] / seconds[key]:.2f} of the product"
                    if "product|False" in seconds
                    else ""
                )
                print(
                    f"{label}{seconds[key]:>8.3f} s  ratio {ratio:.2f}  adds {memory['added'] / 1e6:>7.0f} MB{rate}",
                    flush=True,
                )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--measure", choices=("memory", "time"), help=argparse.SUPPRESS)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    match options.measure:
        case "memory":
            print(json.dumps(measure_memory(options, options.only, options.name, backward=options.backward)))
        case "time":
            print(json.dumps(measure_times(options, options.only)))
        case _:
            report(options)


if __name__ == "__main__":
    main()
