"""The vocabulary pass against log_softmax of whole rows, Liger's and cut-cross-entropy's.

    python benchmarks/vocabulary_pass.py [--vocabulary 32000 151936] [--tokens 1024] [--hidden 256] [--device cpu]

Passes: log-probabilities of sampled tokens; the same with the 20 most probable tokens; with gradients of hidden states
and weight for a weighted sum of them (Liger's GRPO loss: the same gradients, found in its forward pass); and the
forward KL to a model half as wide (--actor-hidden), with its gradients. Variants take turns. On a CPU, where memory is
that of a process, each variant's peak is measured in a process of its own. On a GPU the rate is shown as a part of that
of as many 16-bit matrix products of the same sizes as whole rows need: one, three with gradients, and for the KL the
policy's one and the actor's three. Ours makes the logits anew for the gradients: four, and two and four.

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

from jackpot.algorithm.distillation import forward_kl
from jackpot.algorithm.output_head import OutputHead
from jackpot.algorithm.vocabulary import differentiable_token_logprobs, token_logprobs

NAMES = ("whole rows", "jackpot", "liger (GRPO loss)", "cut-cross-entropy")
FORWARD, TOP, BACKWARD, KL = PASSES = ("forward", "forward, top 20", "forward + backward", "KL, forward + backward")
SEQUENCES = 8  # Liger goes sequence by sequence
Pass = Callable[[], object]


class Inputs:
    """Hidden states [T, H], weight [V, H], sampled ids [T] and a factor for each [T], of no particular model; and the
    same of an actor's."""

    def __init__(self, options: argparse.Namespace, vocabulary: int) -> None:
        self._device = options.device
        self._generator = torch.Generator(self._device).manual_seed(0)
        self.hidden, self.weight = self._model(options.tokens, options.hidden, vocabulary)
        self.actor_hidden, self.actor_weight = self._model(
            options.tokens, options.actor_hidden or options.hidden // 2, vocabulary
        )
        shape = (options.tokens,)
        self.ids = torch.randint(vocabulary, shape, generator=self._generator, device=self._device)
        self.factors = torch.randn(shape, generator=self._generator, device=self._device)

    def _model(self, tokens: int, width: int, vocabulary: int) -> tuple[Tensor, Tensor]:
        dtype = torch.bfloat16 if self._device == "cuda" else torch.float32
        hidden = torch.randn(tokens, width, generator=self._generator, device=self._device)
        weight = torch.randn(vocabulary, width, generator=self._generator, device=self._device).div_(width**0.5)
        return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()

    def backward(self, values: Tensor) -> None:
        """Gradients, and away with them."""
        (values * self.factors).sum().backward()
        for leaf in (self.hidden, self.weight, self.actor_hidden, self.actor_weight):
            leaf.grad = None

    def products(self, kind: str) -> list[Pass]:
        """The matrix products of 16-bit numbers that a pass cannot do without."""
        hidden, weight = self.hidden.detach(), self.weight.detach()
        if kind in (FORWARD, TOP):
            return [lambda: hidden @ weight.t()]
        if kind == BACKWARD:
            return [lambda: hidden @ weight.t()] * 3
        actor_hidden, actor_weight = self.actor_hidden.detach(), self.actor_weight.detach()
        return [lambda: hidden @ weight.t(), *[lambda: actor_hidden @ actor_weight.t()] * 3]


def make_pass(name: str, inputs: Inputs, kind: str) -> Pass:
    """A variant.

    Raises:
        ImportError: it is not installed.
        NotImplementedError: it has no such pass.
    """
    if name == "whole rows":
        return _whole_rows(inputs, kind)
    if name == "jackpot":
        return _jackpot(inputs, kind)
    if name == "cut-cross-entropy":
        return _cut_cross_entropy(inputs, kind)
    return _liger(inputs, kind)


def _whole_rows(inputs: Inputs, kind: str) -> Pass:
    def rows(hidden: Tensor, weight: Tensor) -> Tensor:
        return (hidden @ weight.t()).float().log_softmax(-1)

    def logprobs() -> Tensor:
        return rows(inputs.hidden, inputs.weight).gather(1, inputs.ids[:, None])[:, 0]

    @torch.no_grad()
    def forward() -> object:
        return logprobs()

    @torch.no_grad()
    def top() -> object:
        found = rows(inputs.hidden, inputs.weight)
        return found.gather(1, inputs.ids[:, None]), found.topk(20)

    def kl() -> None:
        policy = rows(inputs.hidden.detach(), inputs.weight.detach())
        actor = rows(inputs.actor_hidden, inputs.actor_weight)
        inputs.backward((policy.exp() * (policy - actor)).sum(-1))

    return {FORWARD: forward, TOP: top, BACKWARD: lambda: inputs.backward(logprobs()), KL: kl}[kind]


def _jackpot(inputs: Inputs, kind: str) -> Pass:
    head, actor = OutputHead(inputs.weight), OutputHead(inputs.actor_weight)

    def both() -> None:
        inputs.backward(differentiable_token_logprobs(inputs.hidden, head, inputs.ids).logprobs)

    def kl() -> None:
        inputs.backward(forward_kl(inputs.hidden.detach(), head, inputs.actor_hidden, actor))

    return {
        FORWARD: lambda: token_logprobs(inputs.hidden, head, inputs.ids),
        TOP: lambda: token_logprobs(inputs.hidden, head, inputs.ids, top_k=20),
        BACKWARD: both,
        KL: kl,
    }[kind]


def _cut_cross_entropy(inputs: Inputs, kind: str) -> Pass:
    from cut_cross_entropy import linear_cross_entropy

    kernel = "cce" if inputs.hidden.is_cuda else "torch_compile"

    def logprobs() -> Tensor:
        return -linear_cross_entropy(inputs.hidden, inputs.weight, inputs.ids, impl=kernel, reduction="none")

    if kind == BACKWARD:
        return lambda: inputs.backward(logprobs())
    if kind != FORWARD:
        raise NotImplementedError("has no such pass")

    @torch.no_grad()
    def forward() -> object:
        return logprobs()

    return forward


def _liger(inputs: Inputs, kind: str) -> Pass:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    if kind != BACKWARD:
        raise NotImplementedError("has no such pass")
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=inputs.hidden.is_cuda)
    length = len(inputs.hidden) // SEQUENCES
    ids, mask = inputs.ids.view(SEQUENCES, length), torch.ones(SEQUENCES, length, device=inputs.ids.device)
    advantages = inputs.factors[:SEQUENCES]

    def run() -> None:
        loss(inputs.hidden.view(SEQUENCES, length, -1), inputs.weight, ids, mask, advantages)[0].backward()
        inputs.hidden.grad = inputs.weight.grad = None

    return run


def peak_bytes() -> int:
    """The greatest memory that this process has had."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def measure_memory(options: argparse.Namespace, vocabulary: int, name: str, kind: str) -> dict[str, Any]:
    """Bytes that one pass adds to this process's peak."""
    inputs = Inputs(options, vocabulary)
    # A tiny pass first: libraries, threads and compilers take memory once, which is no matter of size.
    small = argparse.Namespace(**vars(options) | {"tokens": 16})
    make_pass(name, Inputs(small, 64), kind)()
    run = make_pass(name, inputs, kind)
    before = peak_bytes()
    run()
    return {"added": peak_bytes() - before}


def timed(run: Pass, device: str) -> float:
    """Seconds of a pass."""
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure_pass(options: argparse.Namespace, vocabulary: int, kind: str) -> dict[str, dict[str, Any]]:
    """Of each variant the median seconds over rounds in which all take their turn, after one that compiles; on a GPU
    also the bytes that it adds, and the seconds of the products."""
    inputs = Inputs(options, vocabulary)
    passes: dict[str, Pass] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in NAMES:
        try:
            run = make_pass(name, inputs, kind)
            run()
        except Exception as error:  # whatever another library cannot do here is told in the table
            found[name] = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:80]}
            continue
        passes[name], found[name] = run, {}
        if options.device == "cuda":
            found[name]["added"] = added_on_gpu(run)
    if options.device == "cuda":
        products = inputs.products(kind)
        passes["products"], found["products"] = lambda: [run() for run in products], {}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(options.rounds):
        for name, run in passes.items():
            seconds[name].append(timed(run, options.device))
    for name, values in seconds.items():
        found[name]["seconds"] = statistics.median(values)
    return found


def added_on_gpu(run: Pass) -> int:
    """Bytes of the GPU's memory that a pass takes beyond what is there before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def in_subprocess(*arguments: str) -> dict[str, Any]:
    """One measurement in a process of its own, with this one's arguments."""
    command = [sys.executable, __file__, *sys.argv[1:], *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def report(options: argparse.Namespace) -> None:
    """Print the table."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    for vocabulary in options.vocabulary:
        print(f"{options.tokens} tokens, hidden {options.hidden}, vocabulary {vocabulary}, {device}")
        for kind in options.passes:
            found = (
                measure_pass(options, vocabulary, kind)
                if options.device == "cuda"
                else in_subprocess("--measure", "time", "--only", str(vocabulary), "--kind", kind)
            )
            for name in NAMES:
                row = found[name]
                label = f"  {kind:<24}{name:<20}"
                if "error" in row:
                    print(f"{label}does not run here: {row['error']}", flush=True)
                    continue
                if "added" not in row:
                    row |= in_subprocess(
                        "--measure", "memory", "--only", str(vocabulary), "--kind", kind, "--name", name
                    )
                ratio = row["seconds"] / found["whole rows"].get("seconds", float("nan"))
                text = f"{1000 * row['seconds']:>8.2f} ms  ratio {ratio:.2f}  adds {row['added'] / 1e6:>7.0f} MB"
                if "products" in found:
                    text += f"  {found['products']['seconds'] / row['seconds']:.2f} of the products"
                print(label + text, flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--actor-hidden", type=int, help="of the KL's actor (default half of --hidden)")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--measure", choices=("memory", "time"), help=argparse.SUPPRESS)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=PASSES, help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    match options.measure:
        case "memory":
            print(json.dumps(measure_memory(options, options.only, options.name, options.kind)))
        case "time":
            print(json.dumps(measure_pass(options, options.only, options.kind)))
        case _:
            report(options)


if __name__ == "__main__":
    main()
