"""A rank of a learner for tests: torchrun starts it over gloo; rank 0 trains on batches from files, the others follow.

``torchrun … ranks_world.py DIRECTORY``: reads job.json and batch-*.bin, writes metrics.json, policy.safetensors and
actor.safetensors there. ``plan.json`` says what rank 0 does: a list of [train, i], [save], [restore], [exit, rank].
Other ranks read their groups of a batch from ``groups/``, whose names say the group, and note them in own-<rank>.json;
where a file lacks, as on a bus that lost it, rank 0 has to send the batch whole.
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

from jackpot.config import JobSpec
from jackpot.storage.run_directory import load_service_job

# AdamW's ε in these tests: a step then changes by at most 2·lr/ε times the change of a gradient. With torch's 1e-8 its
# first step is lr · sign(g), and a gradient that is nothing but rounding moves its weight as far as any other.
EPSILON = 1.0

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost", "--max-restarts", "0"]


def run_ranks(
    directory: Path,
    job: JobSpec,
    batches: Sequence[Any],
    plan: Sequence[Sequence[Any]],
    size: int,
    groups: Sequence[Any] = (),
) -> subprocess.CompletedProcess[str]:
    """Carry out a plan on so many ranks; ``groups`` are what those other than 0 can read."""
    from jackpot.bus.payload_format import encode_scored
    from jackpot.learner.ranks.batch_broadcast import batch_to_bytes

    directory.mkdir(exist_ok=True)
    (directory / "job.json").write_text(job.model_dump_json())
    (directory / "plan.json").write_text(json.dumps(plan))
    for index, batch in enumerate(batches):
        (directory / f"batch-{index}.bin").write_bytes(batch_to_bytes(batch))
    (directory / "groups").mkdir(exist_ok=True)
    for group in groups:
        (directory / "groups" / group.group_id).write_bytes(encode_scored(group))
    command = [sys.executable, *TORCHRUN, "--nproc-per-node", str(size), __file__, str(directory)]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "JACKPOT_RUN_DIR": str(directory), "JACKPOT_JOB_ID": "job"}
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)


def make_steps_smooth(trainer: Any) -> Any:
    """The trainer, with ``EPSILON`` in its optimizers."""
    for learnable in trainer.models.learnables.values():
        for group in learnable.optimizer.param_groups:
            group["eps"] = EPSILON
    return trainer


def main(directory: Path) -> int:
    from jackpot.compute.ranks.group import leave_ranks
    from jackpot.config.environment import ServiceEnvironment
    from jackpot.learner.checkpoints.checkpoint_store import CheckpointStore
    from jackpot.learner.models.start import build_trainer
    from jackpot.learner.ranks.rank_leader import LeadTrainer, follow

    environment = ServiceEnvironment(run_dir=directory, job_id="job", threads=1)
    trainer, ranks = build_trainer(environment, load_service_job(environment))
    make_steps_smooth(trainer)
    store = CheckpointStore(directory / "checkpoints", keep=3, ranks=ranks)
    if ranks.rank > 0:
        own = GroupFiles(directory / "groups")
        code = follow(trainer, store, ranks, own.read)
        (directory / f"own-{ranks.rank}.json").write_text(json.dumps(own.found))
        return code
    leader = LeadTrainer(trainer, ranks) if ranks.size > 1 else None
    rows = carry_out(directory, leader or trainer, store)
    (directory / "metrics.json").write_text(json.dumps(rows))
    if leader is not None:
        leader.dismiss(0)
    leave_ranks()
    return 0


class GroupFiles:
    """Groups as files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.found: list[list[str]] = []  # by batch

    def read(self, group_ids: Sequence[str]) -> dict[str, Any]:
        from jackpot.bus.payload_format import decode_scored

        paths = {group_id: self._directory / group_id for group_id in group_ids}
        groups = {group_id: decode_scored(path.read_bytes()) for group_id, path in paths.items() if path.exists()}
        self.found.append(list(groups))
        return groups


def carry_out(directory: Path, trainer: Any, store: Any) -> list[dict[str, float]]:
    from safetensors.torch import save_file

    from jackpot.learner.checkpoints.checkpoint_store import Progress
    from jackpot.learner.ranks.batch_broadcast import batch_from_bytes

    rows: list[dict[str, float]] = []
    step = 0
    for action, *arguments in json.loads((directory / "plan.json").read_text()):
        match action:
            case "train":
                batch = batch_from_bytes((directory / f"batch-{arguments[0]}.bin").read_bytes())
                rows += trainer.train_batch(batch, step)
                step = int(rows[-1]["step"])
            case "save":
                lambda_control = trainer.lambda_control
                trainer.begin_checkpoint(
                    store, Progress(step, step, lambda_control.obrs_lambda, lambda_control.state())
                ).finish()
            case "restore":
                step = trainer.restore(store, store.latest()).step
    for role in trainer.models:
        save_file(trainer.weights(role), directory / f"{role}.safetensors")
    probes = {role: trainer.probe(role).as_json() for role in trainer.models}
    (directory / "probes.json").write_text(json.dumps(probes))
    return rows


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(code)
