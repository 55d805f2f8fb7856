"""CPU memory that each rank of a learner or scorer takes while its model is loaded and sharded.

``python benchmarks/rank_memory.py [--processes 2] [--layers 8] [--stored bfloat16]`` makes a random model (88 million
parameters for 8 layers), starts the ranks by torchrun over gloo, and prints per service and rank the peak of memory
above what the imports take, until the model is loaded, sharded and has had a first pass, and what is left of it then;
both as multiples of the model in float32, in which it is held. Memory is what the process has for itself: pages of the
model's file, which the kernel takes back when memory is short, do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SERVICES = ("learner", "scorer")
SAMPLE_SECONDS = 0.002
# What is freed goes back to the kernel at once, so that it does not count.
GIVE_BACK = {"MALLOC_TRIM_THRESHOLD_": "131072"}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost", "--max-restarts", "0")


def make_model(directory: Path, layers: int, stored: str) -> int:
    """Write a random Qwen3; the bytes of its parameters in float32."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config
    from transformers.utils import logging

    config = Qwen3Config(
        vocab_size=16384,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.to(getattr(torch, stored)).save_pretrained(directory)
    return size


def own_memory() -> int:
    """Bytes that this process has in memory, without pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no RssAnon")


class Peak(threading.Thread):
    """Notes the most memory that the process has had."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen = 0
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.seen = max(self.seen, own_memory())

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.seen


def rank(directory: Path, service: str) -> None:
    """One rank: join, load, shard, note how much memory that took."""
    import numpy as np
    import torch

    from jackpot.compute.forward import completion_hidden
    from jackpot.compute.ranks.sharding import release
    from jackpot.config import JobSpec
    from jackpot.config.environment import ServiceEnvironment
    from jackpot.learner.models.start import build_trainer
    from jackpot.scorer.ranked_scorer import join_ranked_scorer
    from jackpot.scorer.target import HeldPolicy

    job = JobSpec.model_validate_json((directory / "job.json").read_text())
    environment = ServiceEnvironment(run_dir=directory, job_id="job-1", threads=1)
    torch.nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()  # what torch itself sets up at first use
    base = own_memory()
    peak = Peak()
    peak.start()
    started = time.monotonic()
    if service == "learner":
        trainer, ranks = build_trainer(environment, job)
        model = trainer.models["policy"]
    else:
        ranks = join_ranked_scorer(environment, job).ranks
        model = HeldPolicy(job.policy, "cpu", ranks).model
    with torch.no_grad():
        completion_hidden(model, [np.arange(8)], [1])
    release(model)
    seconds = time.monotonic() - started
    noted = {"peak": peak.stop() - base, "left": own_memory() - base, "seconds": seconds}
    (directory / f"{service}-{ranks.rank}.json").write_text(json.dumps(noted))
    ranks.broadcast()  # nobody leaves before all are done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--stored", default="bfloat16", choices=["float32", "bfloat16"], help="as the file has it")
    parser.add_argument("--kl-penalty", action="store_true", help="the learner holds the initial policy, too")
    parser.add_argument("--rank", nargs=2, metavar=("DIRECTORY", "SERVICE"))
    arguments = parser.parse_args()
    if arguments.rank:
        rank(Path(arguments.rank[0]), arguments.rank[1])
        sys.stdout.flush()
        os._exit(0)  # the thread that keeps in touch with the ranks goes with it
    from jackpot.config import parse_job

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        size = make_model(directory / "model", arguments.layers, arguments.stored)
        print(f"model: {size / 1e6:.0f} MB, stored in {arguments.stored}, {arguments.processes} ranks")
        settings = {"processes": arguments.processes}
        data = {
            "policy": {"model": str(directory / "model")},
            "actor": "policy",
            "task": {"name": "complement"},
            "algorithm": {"kl_penalty": {"weight": 0.1 if arguments.kl_penalty else 0.0}},
            "learner": settings,
            "scorer": settings,
        }
        (directory / "job.json").write_text(parse_job(data).model_dump_json())
        print("| service | rank | peak | left | seconds |\n| --- | --- | --- | --- | --- |")
        for service in SERVICES:
            command = [*TORCHRUN, "--nproc-per-node", str(arguments.processes), __file__, "--rank", name, service]
            subprocess.run([sys.executable, *command], check=True, timeout=600, env=os.environ | GIVE_BACK)
            for number in range(arguments.processes):
                noted = json.loads((directory / f"{service}-{number}.json").read_text())
                memory = f"{noted['peak'] / size:.2f} | {noted['left'] / size:.2f}"
                print(f"| {service} | {number} | {memory} | {noted['seconds']:.1f} |")


if __name__ == "__main__":
    main()
