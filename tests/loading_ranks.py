"""A rank for tests of loading: torchrun starts it over gloo; it loads and shards models, and writes what it got.

``torchrun … loading_ranks.py DIRECTORY``: for every model of models.json, a list of [directory, number format, longest
sequence], writes what it holds of the sharded model to <index>-<rank>.safetensors, and to report-<rank>.json what it
saw before, and how it was refused.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patience import PATIENCE_SECONDS
from ranks_world import TORCHRUN


def load_on(directory: Path, models: Sequence[tuple[Path, str, int | None]], size: int) -> list[list[dict[str, Any]]]:
    """What each rank reports of each model."""
    (directory / "models.json").write_text(json.dumps([[str(path), *rest] for path, *rest in models]))
    command = [sys.executable, *TORCHRUN, "--nproc-per-node", str(size), __file__, str(directory)]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((directory / f"report-{rank}.json").read_text()) for rank in range(size)]


def _read_back(held: Any, model_dir: Path) -> bool:
    """Whether the directory's file, read as a weight version, gives what this rank holds already."""
    import torch

    from jackpot.errors import WeightCorruptError

    try:
        read = held.read(model_dir)
    except (WeightCorruptError, FileNotFoundError):
        return False
    return all(torch.equal(read[name], tensor) for name, tensor in held._local.items())


def main(directory: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from jackpot.compute.forward import completion_hidden
    from jackpot.compute.model_weights import hub_format, own_tensors
    from jackpot.compute.models import output_head
    from jackpot.compute.ranks.group import join_ranks
    from jackpot.compute.ranks.held_tensors import HeldTensors
    from jackpot.compute.ranks.loading import load_on_ranks
    from jackpot.compute.ranks.sharding import release, shard
    from jackpot.config import LearnerConfig
    from jackpot.errors import ConfigError

    config = LearnerConfig(processes=int(os.environ["WORLD_SIZE"]))
    ranks = join_ranks("learner", config, torch.device("cpu"))
    report: list[dict[str, Any]] = []
    for index, (path, dtype, context_length) in enumerate(json.loads((directory / "models.json").read_text())):
        try:
            model = load_on_ranks(
                path, dtype, ranks, torch.device("cpu"), field="policy.model", context_length=context_length
            )
            meta = [parameter.is_meta for parameter in model.parameters()]
            shard(model, ranks, None, field="policy.model")
        except ConfigError as error:
            report.append({"refused": str(error)})
            continue
        held = HeldTensors(model)
        save_file(
            {name: tensor.detach().clone() for name, tensor in held._local.items()},
            directory / f"{index}-{ranks.rank}.safetensors",
        )
        with torch.no_grad():
            hidden = completion_hidden(model, [[5, 6, 7, 8]], [1])
            logits = output_head(model).logits(hidden).float()
        release(model)
        seen = {"meta": meta, "aliases": own_tensors(model)[1], "logits": logits.tolist()}
        report.append(seen | {"layout": hub_format(model).layout, "read_back": _read_back(held, Path(path))})
    (directory / f"report-{ranks.rank}.json").write_text(json.dumps(report))
    ranks.broadcast()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
