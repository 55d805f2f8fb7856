"""A rank of a scorer for tests: torchrun starts it over gloo; rank 0 scores groups from a file, the others follow.

``torchrun … scoring_ranks.py DIRECTORY``: for each job-*.json scores groups-0.bin with policy version 0 and, once
version 1 is there, groups-1.bin with that; writes scored-<job>-<version>.bin. Each rank writes to held-<rank>.json how
many bytes of a version it reads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from patience import PATIENCE_SECONDS
from ranks_world import TORCHRUN

from jackpot.bus.payload_format import decode_group, decode_scored, encode_group, encode_scored
from jackpot.compute.ranks.group import Ranks
from jackpot.config import JobSpec
from jackpot.config.environment import ServiceEnvironment
from jackpot.scorer.target import TargetPolicy
from jackpot.trajectory import Group, ScoredGroup


def score_on_ranks(
    directory: Path, jobs: Sequence[JobSpec], batches: Sequence[Sequence[Group]], size: int
) -> dict[tuple[int, int], list[ScoredGroup]]:
    """The scores of each batch under each job, by (job, batch); each batch is scored by the version of its number."""
    for index, job in enumerate(jobs):
        (directory / f"job-{index}.json").write_text(job.model_dump_json())
    for index, groups in enumerate(batches):
        write(directory / f"groups-{index}.bin", [encode_group(group) for group in groups])
    command = [sys.executable, *TORCHRUN, "--nproc-per-node", str(size), __file__, str(directory)]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        (job, batch): [decode_scored(data) for data in read(directory / f"scored-{job}-{batch}.bin")]
        for job in range(len(jobs))
        for batch in range(len(batches))
    }


def write(path: Path, parts: Sequence[bytes]) -> None:
    head = json.dumps([len(part) for part in parts]).encode()
    path.write_bytes(head + b"\n" + b"".join(parts))


def read(path: Path) -> list[bytes]:
    head, _, content = path.read_bytes().partition(b"\n")
    parts, start = [], 0
    for size in json.loads(head):
        parts.append(content[start : start + size])
        start += size
    return parts


def main(directory: Path) -> None:
    from jackpot.compute.ranks.group import leave_ranks
    from jackpot.compute.ranks.orders import Orders
    from jackpot.scorer.ranked_scorer import RankedScorer, join_ranked_scorer
    from jackpot.storage.weights import WeightStore

    environment = ServiceEnvironment(run_dir=directory, job_id="job-1", threads=1)
    jobs = [JobSpec.model_validate_json(path.read_text()) for path in sorted(directory.glob("job-*.json"))]
    ranks = join_ranked_scorer(environment, jobs[0]).ranks
    for index, job in enumerate(jobs):
        if index == 0:
            note_held_bytes(directory, ranks, job)
        members = RankedScorer(ranks, Orders(ranks, job.scorer.collective_timeout_seconds) if ranks.rank == 0 else None)
        store = WeightStore(directory / "weights")
        if members.orders is None:
            assert members.make_follower(job, store).run() == 0
            continue
        target, scorer = members.make_scorer(job, store)
        for version in range(2):
            make_newest(directory, version)
            pending = target.read_newer()
            assert pending is not None and pending.version == version
            target.apply(pending)
            groups = [decode_group(data) for data in read(directory / f"groups-{version}.bin")]
            scored = scorer.score_groups(groups)
            write(directory / f"scored-{index}-{version}.bin", [encode_scored(one) for one in scored])
        refuse_another(directory, target)
        members.orders.dismiss(0)
    leave_ranks()


def refuse_another(directory: Path, target: TargetPolicy) -> None:
    """Version 2 carries the probe of version 1, which all ranks hold again then."""
    from jackpot.errors import WeightCorruptError

    make_newest(directory, 2)
    pending = target.read_newer()
    assert pending is not None
    try:
        target.apply(pending)
    except WeightCorruptError:
        assert target.version == 1
    else:
        raise AssertionError("a version that does not give its probe is in use")


def note_held_bytes(directory: Path, ranks: Ranks, job: JobSpec) -> None:
    from jackpot.scorer.target import HeldPolicy
    from jackpot.storage.weights import WeightStore

    store = WeightStore(directory / "weights")
    state = HeldPolicy(job.policy, "cpu", ranks).read(store.open("policy", 0))
    held = sum(tensor.untyped_storage().nbytes() for tensor in state.values())
    (directory / f"held-{ranks.rank}.json").write_text(json.dumps(held))


def make_newest(directory: Path, version: int) -> None:
    """Of versions that are all published already."""
    (directory / "weights" / "policy" / "LATEST").write_text(f"{version}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
