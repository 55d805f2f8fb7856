"""Samples per second end to end, against TRL's GRPOTrainer on the same models, task, batch and machine.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl && /tmp/trl/bin/pip install -e '.[local]'
    python benchmarks/trl_grpo.py --trl-python /tmp/trl/bin/python [--policy 256x4] [--threads 2] [--jackpot-threads 2]

TRL needs an environment of its own, in which this package can be imported, too (PYTHONPATH=services). Both sides train
the demo's policy, or one of its architecture with --policy WIDTHxLAYERS and random weights (rates do not depend on
them, lengths a little: nearly all completions have 16 tokens), on the demo's prompts and rewards, 16 prompts × 8
completions of at most 16 tokens a step, one update a batch, AdamW, temperature 1, clip 0.2, no KL penalty, float32,
evaluation only before and after. TRL samples with the policy itself through transformers' generate, as it does by
default on a CPU; more than one thread (--threads) helps it on an idle machine and harms it badly on a busy one. Jackpot
runs once on-policy (``actor: policy``, with the reference from the learner's own pass), the like-for-like comparison,
and twice with the demo's cheaper actor, which is then trained as well: with the reference from the learner's own pass,
and with a scorer. All alternate. The rate is taken from the second step's end to the last one's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jackpot.config import load_job
from jackpot.control_plane.sessions.preparation import resolve_models

JOB_FILE = Path(__file__).parent.parent / "examples" / "demo.yaml"
PROMPTS, GROUP_SIZE, MAX_TOKENS, LR = 16, 8, 16, 1.5e-3


def write_policy(directory: Path, width: int, layers: int) -> None:
    """A policy like the demo's of another size, with random weights and the demo's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    demo = Path(resolve_models(load_job(JOB_FILE, [])).policy.model)
    config = AutoConfig.from_pretrained(demo)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = width, 3 * width, layers
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, width // 4
    config.layer_types = ["full_attention"] * layers
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(demo / name, directory / name)


def trl_rate(steps: int, threads: int, policy: list[str]) -> float:
    """Trajectories per second of TRL. Runs in TRL's own environment."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from jackpot.orchestrator.tasks import build_task

    torch.set_num_threads(threads)
    job = resolve_models(load_job(JOB_FILE, policy))
    task = build_task(job.task, job.seed)
    items = [task.train_prompt(index) for index in range(PROMPTS * (steps + 1))]
    by_prompt = {item.prompt: item for item in items}
    tokenizer = AutoTokenizer.from_pretrained(job.policy.model)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [task.reward(by_prompt[p], text) for p, text in zip(prompts, completions, strict=True)]

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.policy.model, dtype=torch.float32),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": item.prompt} for item in items]),
        processing_class=tokenizer,
        callbacks=[Clock()],
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(prefix="trl-benchmark-"),
            per_device_train_batch_size=PROMPTS * GROUP_SIZE,
            gradient_accumulation_steps=1,
            steps_per_generation=1,
            num_iterations=1,
            num_generations=GROUP_SIZE,
            max_completion_length=MAX_TOKENS,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.0,
            epsilon=0.2,
            loss_type="dapo",
            learning_rate=LR,
            adam_beta2=0.95,
            lr_scheduler_type="constant",
            max_steps=steps,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            use_vllm=False,
            save_strategy="no",
            logging_steps=steps,
            report_to="none",
            disable_tqdm=True,
            seed=0,
        ),
    )
    trainer.train()
    return PROMPTS * GROUP_SIZE * (len(ends) - 2) / (ends[-1] - ends[1])


def trl_side(python: str, steps: int, threads: int, policy: list[str]) -> float:
    """The same in a process of TRL's environment."""
    command = [python, __file__, "--side", "trl", "--steps", str(steps), "--threads", str(threads), *policy]
    # Before what is on the path already: packages may lie there, as they do where nothing can be installed.
    services = os.pathsep.join(
        filter(None, [str(Path(__file__).parent.parent / "services"), os.environ.get("PYTHONPATH")])
    )
    environment = os.environ | {"PYTHONPATH": services, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["samples_per_second"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=sys.executable, help="python of an environment with trl")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of TRL (default 1)")
    parser.add_argument("--jackpot-threads", type=int, default=1, help="torch threads of each service (default 1)")
    parser.add_argument("--policy", help="WIDTHxLAYERS; without, the demo's policy, 64x2")
    parser.add_argument("--side", choices=("trl",), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.side == "trl":
        print(json.dumps({"samples_per_second": trl_rate(options.steps, options.threads, options.overrides)}))
        return
    with tempfile.TemporaryDirectory() as directory:
        policy: list[str] = []
        if options.policy:
            width, layers = map(int, options.policy.split("x"))
            write_policy(Path(directory), width, layers)
            policy = [f"policy.model={directory}"]
        compare(options, policy)


def compare(options: argparse.Namespace, policy: list[str]) -> None:
    """Run all sides in turn, and say what came of it."""
    from pipeline import pipeline_rate

    common = [
        *policy, f"run.threads_per_process={options.jackpot_threads}",
        f"learner.steps={options.steps}", f"evaluation.every={options.steps}", "learner.checkpoint_every=1000",
        "learner.schedule.name=constant", "learner.schedule.warmup_steps=0", "learner.schedule.final_fraction=1",
    ]  # fmt: skip
    # As in TRL: with one update a batch the reference is the learner's own pass.
    reused = "scorer.reuse_reference=true"
    variants = {
        "on-policy": ["actor=policy", reused, *common],
        "cheap actor, reused reference": [reused, *common],
        "cheap actor and scorer": common,
    }
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(1, options.rounds + 1):
        trl = trl_side(options.trl_python, options.steps, options.threads, policy)
        text = f"round {number}: TRL {trl:.0f} samples/s"
        for name, overrides in variants.items():
            rate, _ = pipeline_rate(JOB_FILE, overrides, load_job(JOB_FILE, overrides))
            ratios[name].append(rate / trl)
            text += f"; Jackpot, {name}: {rate:.0f} ({rate / trl:.2f}×)"
        print(text, flush=True)
    for name, values in ratios.items():
        print(f"median, {name}: {statistics.median(values):.2f}× (goal: at least 1.5×)")


if __name__ == "__main__":
    main()
