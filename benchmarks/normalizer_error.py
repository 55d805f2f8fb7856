"""Errors of the estimators of Z against the whole vocabulary, on a real model and actors made from it.

    python benchmarks/normalizer_error.py MODEL_DIR [--positions 300] [--gguf FILE]

The policy is the model as it is. Actors: its matrices rounded to 4 and 3 bits, and its middle layers left out. Each
actor samples completions of its own, and both models are looked at over the whole vocabulary at every sampled token.
Prints a Markdown table of the mean absolute and relative error of Z by estimator and k.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from jackpot.algorithm.corrections.jackpot import NormalizerName
from jackpot.algorithm.obrs import (
    Candidates,
    acceptance_probs,
    estimate_normalizer,
    full_normalizer,
    mean_acceptance,
    normalizer_from,
)

PROMPTS = (
    "The three most important ideas in physics are",
    "def quicksort(items):\n",
    "Once upon a time, in a village by the sea,",
    "Question: A train travels 60 km in 45 minutes. How fast is it?\nAnswer:",
    "Dear Sir or Madam,\n\nI am writing to",
)
ESTIMATORS: tuple[NormalizerName, ...] = ("union_kappa", "tail", "union_tail")
TOP_KS = (4, 8, 20, 50)


def rounded(model: Any, bits: int, group: int = 32) -> Any:
    """A copy whose matrices inside the layers have ``bits`` bits, by groups of ``group`` weights."""
    actor = copy.deepcopy(model)
    for module in actor.model.layers.modules():
        if isinstance(module, nn.Linear):
            blocks = module.weight.data.view(-1, group)
            scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-8) / (2 ** (bits - 1) - 1)
            module.weight.data = ((blocks / scale).round() * scale).view_as(module.weight)
    return actor


def without_layers(model: Any, count: int) -> Any:
    """A copy without ``count`` layers, spread over the middle."""
    actor = copy.deepcopy(model)
    total = len(actor.model.layers)
    left_out = {round(total * (i + 1) / (count + 1)) for i in range(count)}
    actor.model.layers = nn.ModuleList(layer for i, layer in enumerate(actor.model.layers) if i not in left_out)
    for index, layer in enumerate(actor.model.layers):
        layer.self_attn.layer_idx = index
    actor.config.num_hidden_layers = len(actor.model.layers)
    return actor


@torch.no_grad()
def sampled_rows(policy: Any, actor: Any, tokenizer: Any, positions: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Sampled ids [T] and rows of log-probabilities of both models [T, V], prompt by prompt."""
    length = positions // len(PROMPTS)
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        start = ids.shape[1]
        new, past = ids, None
        for _ in range(length):
            out = actor(input_ids=new, past_key_values=past, use_cache=True)
            new, past = torch.multinomial(out.logits[0, -1].float().softmax(-1), 1)[None], out.past_key_values
            ids = torch.cat([ids, new], dim=1)
        rows = [m(input_ids=ids).logits[0, start - 1 : -1].float().log_softmax(-1) for m in (policy, actor)]
        yield ids[0, start:], rows[0], rows[1]


def candidates(p_target: Tensor, p_actor: Tensor, k: int) -> Candidates:
    """Both models' top-k, the actor's in the precision of the wire."""
    actor, target = p_actor.topk(k), p_target.topk(k)
    return Candidates(
        actor_ids=actor.indices,
        actor_logprobs=actor.values.half().float(),
        target_logprobs_on_actor=p_target.gather(1, actor.indices),
        target_ids=target.indices,
        target_logprobs=target.values,
        actor_logprobs_on_target=p_actor.gather(1, target.indices),
    )


def report(name: str, rows: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """The table's lines for one actor, at λ = 1."""
    ids, p_target, p_actor = (torch.cat(parts) for parts in zip(*rows, strict=True))
    exact = full_normalizer(p_target, p_actor, 1.0).head
    sampled = (rows_.gather(1, ids[:, None])[:, 0] for rows_ in (p_target, p_actor))
    acceptance = mean_acceptance(acceptance_probs(*sampled, 1.0))
    kl = float((p_target.exp() * (p_target - p_actor)).sum(-1).mean())
    for k in TOP_KS:
        cells = []
        for estimator in ESTIMATORS:
            parts = estimate_normalizer(estimator, candidates(p_target, p_actor, k), 1.0)
            z = normalizer_from(parts.head, parts.tail, estimator, acceptance).value
            error = (z - exact).abs()
            above = f", {float((z > 1).float().mean()):.0%} > 1" if estimator == "union_kappa" else ""
            cells.append(f"{float(error.mean()):.3f} / {float((error / exact).mean()):.2f}{above}")
        print(f"| {name} | {kl:.2f} | {float(exact.mean()):.2f} | {k} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--positions", type=int, default=300)
    parser.add_argument("--gguf", help="name of a GGUF file in the directory")
    options = parser.parse_args()
    torch.manual_seed(0)
    extra = {"gguf_file": options.gguf} if options.gguf else {}
    policy = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, **extra).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model, **extra)
    print("| actor | KL(p_t‖p_inf) | mean Z | k | " + " | ".join(f"`{e}` abs / rel" for e in ESTIMATORS) + " |")
    print("| --- " * (4 + len(ESTIMATORS)) + "|", flush=True)
    for name, make in (
        ("4-bit weights", lambda: rounded(policy, 4)),
        ("3-bit weights", lambda: rounded(policy, 3)),
        ("2 layers left out", lambda: without_layers(policy, 2)),
        ("5 layers left out", lambda: without_layers(policy, 5)),
    ):
        report(name, list(sampled_rows(policy, make(), tokenizer, options.positions)))


if __name__ == "__main__":
    main()
