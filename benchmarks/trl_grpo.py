"""Samples per second end to end, against TRL's GRPOTrainer on the same models, task, batch and machine.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl && /tmp/trl/bin/pip install -e '.[local]'
    python benchmarks/trl_grpo.py --trl-python /tmp/trl/bin/python [--policy 256x4] [--threads 2] [--jackpot-threads 2]
    python benchmarks/trl_grpo.py --device cuda --dtype bfloat16 --policy 512x8 --max-tokens 64 --json results.jsonl

TRL needs an environment of its own, in which this package can be imported, too (PYTHONPATH=services). Both sides train
the demo's policy, or one of its architecture with --policy WIDTHxLAYERS and random weights (rates do not depend on
them, lengths a little: each token ends a completion with a probability of about one in 47), on the demo's prompts and
rewards, 16 prompts (--prompts) × 8 completions of at most 16 tokens (--max-tokens) a step, one update a batch, AdamW,
temperature 1, clip 0.2, no KL penalty, evaluation only before and after, and then of 16 prompts. TRL samples with the
policy itself through transformers' generate, which is its default (its other ways, vLLM and transformers' continuous
batching, are not tried); more than one thread (--threads) helps it on an idle machine and harms it badly on a busy one.
Jackpot runs once on-policy (``actor: policy``, with the reference from the learner's own pass; no correction and no
kept trajectories, which TRL does not have here either), the like-for-like comparison, and twice with the demo's cheaper
actor (or --actor WIDTHxLAYERS), which is then trained as well, and corrected for by OBRS: with the reference from the
learner's own pass, and with a scorer. All alternate. The rate is taken from the second step's end to the last one's.
Sampling may be --staleness optimizer steps old (default 1, Jackpot's; TRL knows only 0).

--device cuda puts TRL, and all of Jackpot's services, on one GPU, each service in a process of its own. --dtype
bfloat16 keeps weights and AdamW's moments in float32 on both sides and computes in bfloat16: TRL with ``bf16=True``
(autocast, also while it samples), Jackpot with ``dtype: bfloat16`` of the models (the learner on a copy of its weights
in bfloat16, rollout and scorer with weights in bfloat16). float32 is float32 throughout, without TF32.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jackpot.config import load_job
from jackpot.control_plane.sessions.preparation import resolve_models
from jackpot.demo.examples import prompt_tokens
from jackpot.demo.task import NUM_DIGITS

JOB_FILE = Path(__file__).parent.parent / "examples" / "demo.yaml"
GROUP_SIZE = 8
VARIANTS = ("on-policy", "cheap actor, reused reference", "cheap actor and scorer")
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "triton", "numpy")


@dataclass(frozen=True)
class Settings:
    """What both sides are told."""

    steps: int
    prompts: int
    max_tokens: int
    device: str
    dtype: str
    threads: int
    jackpot_threads: int
    staleness: int
    policy: str
    """A directory."""
    actor: str
    """A directory."""
    policy_shape: str
    actor_shape: str

    @property
    def batch(self) -> int:
        """Completions of a step."""
        return self.prompts * GROUP_SIZE

    @property
    def lr(self) -> float:
        """The demo's, constant."""
        return load_job(JOB_FILE, []).learner.lr


@dataclass(frozen=True)
class Side:
    """What one side did."""

    samples_per_second: float
    tokens_per_sample: float
    details: dict[str, Any]


def write_model(directory: Path, role: str, shape: str | None, positions: int) -> None:
    """A demo model with room for so many tokens, or one of another size with random weights; the demo's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from jackpot.compute.model_loading import quiet

    job = resolve_models(load_job(JOB_FILE, []))
    demo = Path(job.policy.model if role == "policy" else job.rollout_model.model)
    config = AutoConfig.from_pretrained(demo)
    config.max_position_embeddings = max(positions, config.max_position_embeddings)
    if shape is None:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(demo, config=config, dtype=torch.float32)
    else:
        width, layers = map(int, shape.split("x"))
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = width, 3 * width, layers
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, width // 4
        config.layer_types = ["full_attention"] * layers
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with quiet():
        model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(demo / name, directory / name)


def trl_run(settings: Settings) -> Side:
    """TRL's side. Runs in TRL's own environment."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from jackpot.orchestrator.tasks import build_task

    torch.set_num_threads(settings.threads)
    job = load_job(JOB_FILE, [])
    task = build_task(job.task, job.seed)
    items = [task.train_prompt(index % task.num_prompts) for index in range(settings.prompts * (settings.steps + 1))]
    by_prompt = {item.prompt: item for item in items}
    on_gpu = settings.device == "cuda"
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu and len(ends) in (1, settings.steps - 1):  # the two that count: what they launched is done
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [task.reward(by_prompt[p], text) for p, text in zip(prompts, completions, strict=True)]

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings.policy, dtype=torch.float32),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": item.prompt} for item in items]),
        processing_class=AutoTokenizer.from_pretrained(settings.policy),
        callbacks=[Clock()],
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(prefix="trl-benchmark-"),
            per_device_train_batch_size=settings.batch,
            gradient_accumulation_steps=1,
            steps_per_generation=1,
            num_iterations=1,
            num_generations=GROUP_SIZE,
            max_completion_length=settings.max_tokens,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.0,
            epsilon=0.2,
            loss_type="dapo",
            learning_rate=settings.lr,
            adam_beta2=0.95,
            lr_scheduler_type="constant",
            max_steps=settings.steps,
            bf16=settings.dtype == "bfloat16",
            gradient_checkpointing=False,
            use_cpu=not on_gpu,
            use_vllm=False,
            save_strategy="no",
            logging_steps=settings.steps,
            report_to="none",
            disable_tqdm=True,
            seed=0,
        ),
    )
    trainer.train()
    details = {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "parameters": trainer.model.num_parameters(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in PACKAGES},
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "step_seconds": [after - before for before, after in pairwise(ends[1:])],
    }
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    rate = settings.batch * (len(ends) - 2) / (ends[-1] - ends[1])
    return Side(rate, statistics.mean(lengths), details)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def trl_side(python: str, settings: Settings) -> Side:
    """The same in a process of TRL's environment."""
    # Before what is on the path already: packages may lie there, as they do where nothing can be installed.
    services = os.pathsep.join(
        filter(None, [str(Path(__file__).parent.parent / "services"), os.environ.get("PYTHONPATH")])
    )
    environment = os.environ | {
        "PYTHONPATH": services,
        "OMP_NUM_THREADS": str(settings.threads),
        "HF_HUB_OFFLINE": "1",
    }
    command = [python, __file__, "--side", json.dumps(asdict(settings))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return Side(**json.loads(done.stdout.splitlines()[-1]))


def jackpot_side(settings: Settings, variant: str) -> Side:
    """One of Jackpot's variants, through `jackpot run`."""
    from pipeline import rate_of, run_job

    overrides = jackpot_settings(settings, variant)
    job = load_job(JOB_FILE, overrides)
    run = run_job(JOB_FILE, overrides)
    lengths = [row["response/length_mean"] for row in run.rows]
    details = {
        "first_step_seconds": run.first_step_seconds,
        "services": run.summary["services"],
        "train_step_seconds": [after["time"] - before["time"] for before, after in pairwise(run.rows[1:])],
    }
    return Side(rate_of(run, job), statistics.mean(lengths), details)


def jackpot_settings(settings: Settings, variant: str) -> list[str]:
    """The demo's settings that change, as on the command line."""
    batch, positions = settings.batch, prompt_tokens(NUM_DIGITS) + settings.max_tokens
    overrides = [
        f"policy.model={settings.policy}", f"policy.dtype={settings.dtype}",
        *(f"{service}.device={settings.device}" for service in ("learner", "rollout", "scorer")),
        f"run.threads_per_process={settings.jackpot_threads}", f"sampling.max_tokens={settings.max_tokens}",
        f"learner.groups_per_batch={settings.prompts}", f"learner.steps={settings.steps}", f"learner.lr={settings.lr}",
        "learner.checkpoint_every=1000",
        "learner.schedule.name=constant", "learner.schedule.warmup_steps=0", "learner.schedule.final_fraction=1",
        f"evaluation.every={settings.steps}", "evaluation.prompts=16",
        f"orchestrator.max_staleness={settings.staleness}",
        # As TRL does, a whole batch at once.
        f"rollout.max_batch_size={max(256, batch)}", f"rollout.max_queue={max(1024, 4 * batch)}",
        f"orchestrator.max_in_flight_groups={max(64, (1 + settings.staleness) * settings.prompts)}",
        f"scorer.max_groups_per_batch={settings.prompts}",
        *(f"{service}.max_batch_tokens={max(16384, batch * positions)}" for service in ("learner", "scorer")),
    ]  # fmt: skip
    if variant == "on-policy":
        overrides += ["actor=policy", "algorithm.correction={name: none}", "rollout.top_logprobs=1"]
        overrides.append("run.keep_trajectories=0")
    else:
        overrides += [f"actor.model={settings.actor}", f"actor.dtype={settings.dtype}"]
    if variant != "cheap actor and scorer":
        # As in TRL: with one update a batch the reference is the learner's own pass.
        overrides.append("scorer.reuse_reference=true")
    return overrides


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=sys.executable, help="python of an environment with trl")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of both sides (default cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both sides; see above")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of TRL (default 1)")
    parser.add_argument("--jackpot-threads", type=int, default=1, help="torch threads of each service (default 1)")
    parser.add_argument("--staleness", type=int, default=1, help="most of Jackpot's, in optimizer steps (default 1)")
    parser.add_argument("--policy", metavar="WIDTHxLAYERS", help="without, the demo's policy, 64x2")
    parser.add_argument("--actor", metavar="WIDTHxLAYERS", help="without, the demo's actor, 32x1")
    parser.add_argument("--prompts", type=int, default=16, help="prompts a step, of 8 completions each (default 16)")
    parser.add_argument("--max-tokens", type=int, default=16, help="of a completion (default 16)")
    parser.add_argument(
        "--variants",
        type=int,
        nargs="+",
        choices=(1, 2, 3),
        default=(1, 2, 3),
        help="of Jackpot: " + "; ".join(VARIANTS),
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="append each round to it, with settings and versions")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(asdict(trl_run(Settings(**json.loads(options.side))))))
        return
    if options.steps < 3:
        parser.error("rates need three steps or more")
    with tempfile.TemporaryDirectory() as directory:
        models = {role: Path(directory) / role for role in ("policy", "actor")}
        positions = prompt_tokens(NUM_DIGITS) + options.max_tokens
        for role, path in models.items():
            write_model(path, role, getattr(options, role), positions)
        settings = Settings(
            steps=options.steps,
            prompts=options.prompts,
            max_tokens=options.max_tokens,
            device=options.device,
            dtype=options.dtype,
            threads=options.threads,
            jackpot_threads=options.jackpot_threads,
            staleness=options.staleness,
            policy=str(models["policy"]),
            actor=str(models["actor"]),
            policy_shape=options.policy or "the demo's",
            actor_shape=options.actor or "the demo's",
        )
        compare(options, settings, [VARIANTS[number - 1] for number in options.variants])


def compare(options: argparse.Namespace, settings: Settings, variants: list[str]) -> None:
    """Run all sides in turn, and say what came of it: a table in Markdown."""
    print("| round | TRL, samples/s |" + "".join(f" {name} | ratio |" for name in variants))
    print("| --- | --- |" + " --- | --- |" * len(variants), flush=True)
    rates: list[list[float]] = []
    for number in range(1, options.rounds + 1):
        sides = {}
        for name in ("TRL", *variants):
            started = time.perf_counter()
            sides[name] = trl_side(options.trl_python, settings) if name == "TRL" else jackpot_side(settings, name)
            took, rate = time.perf_counter() - started, sides[name].samples_per_second
            print(f"{name}: {rate:.0f} samples/s, {took:.0f} s in all", file=sys.stderr, flush=True)
        rates.append([side.samples_per_second for side in sides.values()])
        print(_table_row(str(number), rates[-1]), flush=True)
        if options.json:
            row = {"round": number, "settings": asdict(settings)} | {name: asdict(side) for name, side in sides.items()}
            with options.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    # Each ratio is of one round, whose sides ran one after the other.
    ratios = [statistics.median(row[1 + place] / row[0] for row in rates) for place in range(len(variants))]
    medians = [statistics.median(column) for column in zip(*rates, strict=True)]
    print(_table_row("median", medians, ratios))
    print(
        "\ntokens per completion: " + ", ".join(f"{name} {side.tokens_per_sample:.1f}" for name, side in sides.items())
    )
    print(f"on {sides['TRL'].details['device']}, TRL {sides['TRL'].details['versions']['trl']}; goal: 1.5 × TRL")


def _table_row(name: str, rates: list[float], ratios: list[float] | None = None) -> str:
    ratios = ratios or [rate / rates[0] for rate in rates[1:]]
    cells = "".join(f" {rate:.0f} | {ratio:.2f} |" for rate, ratio in zip(rates[1:], ratios, strict=True))
    return f"| {name} | {rates[0]:.0f} |{cells}"


if __name__ == "__main__":
    main()
