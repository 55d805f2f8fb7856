"""A learner's step on a GPU, with models of real size, against what `jackpot plan` foresees.

    python benchmarks/learner_step.py [--policy qwen3-1.7b] [--actor qwen3-0.6b] [learner.max_batch_tokens=8192 …]

Makes random models of these shapes in bfloat16, and groups whose prompts and completions have the given lengths (of
completions a mean; they are drawn between half and one and a half times that). Then trains on one batch, again and
again, through the learner's own code, and prints the median time of a step, the arithmetic of the plan's formulas over
that time, also as a part of what a large matrix product reaches, and the peak of the GPU's memory. Rewards and
log-probabilities are made up: they do not matter for the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from jackpot.config import JobSpec, parse_job
from jackpot.config.environment import ServiceEnvironment
from jackpot.learner.models.start import build_trainer
from jackpot.planning.hardware import GPUS
from jackpot.planning.model_shape import KNOWN, ModelShape
from jackpot.planning.plan import Load, make_plan
from jackpot.scoring.batch import Batch, build_batch
from jackpot.trajectory import Group, GroupKey, ScoredGroup, TokenScores, Trajectory, VersionSpan

GROUP_SIZE = 8


def write_model(directory: Path, shape: ModelShape, device: str) -> None:
    """A random Qwen3."""
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        tie_word_embeddings=shape.tied,
    )
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)


def scored_group(random: np.random.Generator, slot: int, prompt_tokens: int, completion_tokens: int) -> ScoredGroup:
    """A group as it comes from the scorer."""
    group_id = GroupKey(slot, 0, slot).group_id("benchmark")
    trajectories, scores = [], []
    for index in range(GROUP_SIZE):
        length = int(random.integers(completion_tokens // 2, completion_tokens * 3 // 2 + 1))
        one = np.ones(length, np.float32)
        trajectories.append(
            Trajectory(
                trajectory_id=f"{group_id}#{index}",
                token_ids=random.integers(0, 1000, length).astype(np.uint32),
                actor_logprobs=-7 * one,
                topk_ids=None,
                topk_logprobs=None,
                version_spans=(VersionSpan(0, 0, length),),
                finish_reason="stop",
                reward=float(index % 2),
            )
        )
        scores.append(
            TokenScores(
                target_logprobs=-7 * one,
                acceptance_probs=one,
                mask=np.ones(length, np.bool_),
                normalizer_head=0.9 * one,
                normalizer_tail=0.1 * one,
                topk_mass=0.9 * one,
            )
        )
    group = Group(
        group_id=group_id,
        prompt_index=slot,
        prompt_token_ids=random.integers(0, 1000, prompt_tokens).astype(np.uint32),
        trajectories=tuple(trajectories),
        temperature=1.0,
        dispatch_version=0,
    )
    return ScoredGroup(group=group, scores=tuple(scores), obrs_lambda=1.0, policy_version=0, normalizer="tail")


def product_rate(device: str) -> float:
    """FLOP/s of a large product of 16-bit matrices, as a median of ten."""
    size = 8192 if device == "cuda" else 512
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(13):
        synchronize(device)
        started = time.perf_counter()
        left @ right
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[3:])


def tell(what: str, started: float) -> None:
    """Progress, for whoever waits."""
    print(f"{what}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(job: JobSpec, batch: Batch, steps: int, device: str) -> tuple[list[float], int]:
    """Seconds of each step after two that warm up, and the peak of the GPU's memory in bytes."""
    with tempfile.TemporaryDirectory() as run_dir:
        started = time.perf_counter()
        trainer, _ = build_trainer(ServiceEnvironment(run_dir=Path(run_dir), job_id="benchmark", threads=0), job)
        tell("the trainer was built", started)
        seconds = []
        for step in range(steps + 2):
            synchronize(device)
            started = time.perf_counter()
            trainer.train_batch(batch, step)
            synchronize(device)
            seconds.append(time.perf_counter() - started)
            tell(f"step {step + 1}", started)
    return seconds[2:], torch.cuda.max_memory_allocated() if device == "cuda" else 0


def describe(options: argparse.Namespace, directory: Path) -> JobSpec:
    """The job whose learner is measured."""
    data: dict[str, Any] = {
        "policy": {"model": str(directory / "policy"), "dtype": options.dtype},
        "actor": "policy",
        "task": {"name": "complement"},
        "learner": {"groups_per_batch": options.groups, "device": options.device},
        "sampling": {
            "group_size": GROUP_SIZE,
            "max_tokens": options.completion_tokens * 3 // 2,
            "temperature": 1.0,
        },
    }
    if options.actor != "none":
        data["actor"] = {"model": str(directory / "actor"), "dtype": options.dtype}
    return parse_job(data, options.overrides)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", choices=sorted(KNOWN), default="qwen3-1.7b")
    parser.add_argument("--actor", choices=[*sorted(KNOWN), "none"], default="qwen3-0.6b", help="none: on-policy")
    parser.add_argument("--layers", type=int, help="of both models, in place of their own")
    parser.add_argument("--groups", type=int, default=8, help=f"of {GROUP_SIZE} trajectories, a batch (default 8)")
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--completion-tokens", type=int, default=1000, help="mean (default 1000)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps (default 3)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="whose data sheet the plan takes")
    parser.add_argument("overrides", nargs="*", help="settings of the job, e.g. learner.activation_checkpointing=true")
    options = parser.parse_intermixed_args()
    shapes = {
        role: KNOWN[name] for role, name in (("policy", options.policy), ("actor", options.actor)) if name != "none"
    }
    if options.layers:
        from dataclasses import replace

        shapes = {role: replace(shape, layers=options.layers) for role, shape in shapes.items()}
    random = np.random.default_rng(0)
    groups = [
        scored_group(random, slot, options.prompt_tokens, options.completion_tokens) for slot in range(options.groups)
    ]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        started = time.perf_counter()
        for role, shape in shapes.items():
            write_model(directory / role, shape, options.device)
        tell("the models were written", started)
        job = describe(options, directory)
        batch = build_batch(groups, job.algorithm.advantage)
        seconds, peak = measure(job, batch, options.steps, options.device)
    tokens = sum(len(sequence.input_ids) for sequence in batch.sequences)
    mean = sum(trajectory.num_tokens for group in groups for trajectory in group.group.trajectories) / len(
        batch.sequences
    )
    load = Load(options.prompt_tokens, mean, 1, GPUS[options.gpu])
    plan = make_plan(job, shapes["policy"], shapes.get("actor", shapes["policy"]), load)
    per_token = plan.flops_per_token.policy_training + plan.flops_per_token.actor_training
    took = statistics.median(seconds)
    achieved = tokens * per_token / took
    print(
        json.dumps(
            {
                "policy": options.policy,
                "actor": options.actor,
                "settings": options.overrides,
                "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
                "tokens": tokens,
                "step_seconds": [round(value, 3) for value in seconds],
                "tokens_per_second": round(tokens / took),
                "tflops": round(achieved / 1e12, 1),
                "of_data_sheet": round(achieved / GPUS[options.gpu].flops, 3),
                "of_product": round(achieved / product_rate(options.device), 3),
                "planned_seconds": round(plan.step_seconds.learner, 3),
                "peak_gb": round(peak / 1e9, 2),
                "planned_gb": round(sum(plan.memory_bytes["learner"].values()) / 1e9, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
