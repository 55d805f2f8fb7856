"""Seconds of one weight swap of a 0.5 B-parameter model from the weight store, against reading the file.

.venv-vllm/bin/python benchmarks/vllm_weight_swap.py --json figures.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from vllm_models import random_model

from jackpot.config import ModelConfig, RolloutConfig, VllmConfig
from jackpot.rollout.vllm.launch import is_cpu_build, prepare_environment, start_vllm
from jackpot.storage.weights import WeightStore


def read_plainly(path: Path) -> float:
    """Seconds to read a file with safetensors, every tensor into memory of its own."""
    import safetensors

    started = time.monotonic()
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = [file.get_tensor(name).clone() for name in file.keys()]  # noqa: SIM118 - not a mapping
    seconds = time.monotonic() - started
    del tensors
    return seconds


async def measure(llm: Any, counts: Any, store: WeightStore, versions: int) -> dict[str, Any]:
    """Medians over the versions."""
    from jackpot.rollout.vllm.engine import VllmEngine

    engine = VllmEngine(llm, counts, eos_ids=(), max_queue=64)
    rounds = []
    for version in range(1, versions + 1):
        started = time.monotonic()
        directory = await asyncio.to_thread(store.open, "actor", version)
        verified = time.monotonic()
        await engine._read(str(directory))  # while sampling goes on
        read = time.monotonic()
        await engine._swap(version, str(directory))  # while it is paused
        applied = time.monotonic()
        plain = await asyncio.to_thread(read_plainly, directory / "model.safetensors")
        rounds.append(
            {
                "verify": verified - started,
                "read": read - verified,
                "paused": applied - read,
                "whole": applied - started,
                "plain_read": plain,
            }
        )
        print(rounds[-1], flush=True)
    await engine.close()
    medians = {name: float(np.median([r[name] for r in rounds])) for name in rounds[0]}
    size = (directory / "model.safetensors").stat().st_size
    return {"bytes": size, "medians": medians, "bytes_per_second": size / medians["whole"], "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="0.5b")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--versions", type=int, default=4)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "jackpot-benchmark-models")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    prepare_environment(1, is_cpu_build())
    from jackpot.rollout.vllm.stats import EngineCounts

    counts = EngineCounts(lambda num_tokens: None)
    model = random_model(arguments.models, arguments.shape, arguments.dtype)
    config = ModelConfig(model=str(model), dtype=arguments.dtype)
    rollout = RolloutConfig(max_batch_size=8, vllm=VllmConfig(max_model_len=512))
    llm = start_vllm(config, rollout, counts, on_cpu=is_cpu_build())
    with tempfile.TemporaryDirectory() as directory:
        store = WeightStore(Path(directory))
        for version in range(1, arguments.versions + 1):
            # A link: the same bytes under another version.
            store.publish("actor", version, lambda aside: _link(model, aside), {})
        figures = asyncio.run(measure(llm, counts, store, arguments.versions))
    print(json.dumps(figures["medians"] | {"bytes": figures["bytes"]}))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def _link(model: Path, aside: Path) -> None:
    (aside / "model.safetensors").hardlink_to(model / "model.safetensors")


if __name__ == "__main__":
    main()
