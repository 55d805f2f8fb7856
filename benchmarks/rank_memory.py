"""CPU memory that each rank of a learner or scorer takes while its model is loaded and sharded.

``python benchmarks/rank_memory.py [--processes 2] [--layers 8]`` makes a random model in float32 (88 million parameters
for 8 layers), starts the ranks by torchrun over gloo, and prints per service and rank the peak of resident memory above
what the imports take, and what is left of it when the model is sharded; both as multiples of the model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SERVICES = ("learner", "scorer")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost", "--max-restarts", "0")


def make_model(directory: Path, layers: int) -> int:
    """Write a random Qwen3 in float32; the bytes of its parameters."""
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
    model.save_pretrained(directory)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def resident(field: str) -> int:
    """Bytes of this process in memory: ``VmRSS`` now, ``VmHWM`` at the most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def rank(directory: Path, service: str) -> None:
    """One rank: join, load, shard, note how much memory that took."""
    import torch

    from jackpot.config import JobSpec
    from jackpot.config.environment import ServiceEnvironment
    from jackpot.learner.start import build_trainer
    from jackpot.runtime.weights import WeightStore
    from jackpot.scorer.members import meet_members
    from jackpot.scorer.target import TargetPolicy

    job = JobSpec.model_validate_json((directory / "job.json").read_text())
    environment = ServiceEnvironment(run_dir=directory, job_id="job-1", threads=1)
    torch.nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()  # what torch itself sets up at first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    base = resident("VmRSS")
    if service == "learner":
        held, ranks = build_trainer(environment, job)
    else:
        ranks = meet_members(environment, job).ranks
        held = TargetPolicy(job.policy, WeightStore(directory / "weights"), "cpu", 1.0, ranks)
    noted = {"peak": resident("VmHWM") - base, "left": resident("VmRSS") - base}
    assert held is not None
    (directory / f"{service}-{ranks.rank}.json").write_text(json.dumps(noted))
    ranks.broadcast()  # nobody leaves before all are done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", nargs=2, metavar=("DIRECTORY", "SERVICE"))
    arguments = parser.parse_args()
    if arguments.rank:
        rank(Path(arguments.rank[0]), arguments.rank[1])
        sys.stdout.flush()
        os._exit(0)  # the thread that keeps in touch with the ranks goes with it
    from jackpot.config import parse_job

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        size = make_model(directory / "model", arguments.layers)
        print(f"model: {size / 1e6:.0f} MB, {arguments.processes} ranks")
        settings = {"processes": arguments.processes}
        data = {
            "policy": {"model": str(directory / "model")},
            "actor": "policy",
            "task": {"name": "complement"},
            "learner": settings,
            "scorer": settings,
        }
        (directory / "job.json").write_text(parse_job(data).model_dump_json())
        print("| service | rank | peak | left |\n| --- | --- | --- | --- |")
        for service in SERVICES:
            command = [*TORCHRUN, "--nproc-per-node", str(arguments.processes), __file__, "--rank", name, service]
            subprocess.run([sys.executable, *command], check=True, timeout=600)
            for number in range(arguments.processes):
                noted = json.loads((directory / f"{service}-{number}.json").read_text())
                print(f"| {service} | {number} | {noted['peak'] / size:.2f} | {noted['left'] / size:.2f} |")


if __name__ == "__main__":
    main()
