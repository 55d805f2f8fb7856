"""Step time over replicas, by simulation, from what one replica of each service takes.

    python benchmarks/scaling.py --run-dir RUN_DIR
    python benchmarks/scaling.py --rollout 5.7 --score 5.7 --train 25.8 [--publish 2] [--groups 16] [--staleness 1]

Seconds are those of one batch on one replica: read from a finished run (``activity/`` and ``metrics.jsonl``), or given,
such as those of `jackpot plan`. Simulated is the pipeline's flow of groups: a batch's groups may be sampled once the
version that its staleness allows is published; rollout and scorer replicas take groups one after the other, first come
first served; the learner takes batches in order and publishes beside its next step. The learner itself is scaled
perfectly by --learners, which real sharding is not. Nothing else is modelled: no network, no stragglers, no failures.
"""

from __future__ import annotations

import argparse
import heapq
import json
from dataclasses import dataclass, replace
from pathlib import Path

STEPS = 200


@dataclass(frozen=True)
class Pipeline:
    """Seconds of a batch on one replica of each service, and the replicas."""

    rollout: float
    score: float
    train: float
    publish: float
    groups: int
    staleness: int
    rollouts: int = 1
    scorers: int = 1
    learners: int = 1


def step_seconds(pipeline: Pipeline) -> float:
    """Mean time of a step once the pipeline is full."""
    rollouts, scorers = [0.0] * pipeline.rollouts, [0.0] * pipeline.scorers
    published = [0.0]  # when each version can be used; version v is there before batch v is trained
    trained = publisher_free = 0.0
    ends = []
    for batch in range(STEPS):
        due = published[max(0, batch - pipeline.staleness)]
        sampled = sorted(_serve(rollouts, due, pipeline.rollout / pipeline.groups) for _ in range(pipeline.groups))
        scored = [_serve(scorers, at, pipeline.score / pipeline.groups) for at in sampled]
        trained = max(trained, max(scored)) + pipeline.train / pipeline.learners
        publisher_free = max(trained, publisher_free) + pipeline.publish
        published.append(publisher_free)
        ends.append(trained)
    half = STEPS // 2
    return (ends[-1] - ends[half - 1]) / (STEPS - half)


def _serve(replicas: list[float], ready: float, seconds: float) -> float:
    """When a piece that is ready at ``ready`` is done by the replica that is free first."""
    done = max(heapq.heappop(replicas), ready) + seconds
    heapq.heappush(replicas, done)
    return done


def of_run(run_dir: Path, groups: int, staleness: int) -> Pipeline:
    """Seconds of a batch as a run's services measured them."""
    batches = len((run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())

    def seconds(name: str, activity: str) -> float:
        paths = [path for path in (run_dir / "activity").glob(f"{name}-*.json") if "evaluator" not in path.name]
        records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        return float(sum(record["seconds"].get(activity, 0.0) for record in records)) / batches

    return Pipeline(
        rollout=seconds("rollout", "generate"),
        score=seconds("scorer", "score"),
        train=seconds("learner", "train"),
        publish=seconds("learner", "publish"),
        groups=groups,
        staleness=staleness,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path)
    for name in ("rollout", "score", "train"):
        parser.add_argument(f"--{name}", type=float, help="seconds of a batch on one replica")
    parser.add_argument("--publish", type=float, default=0.0)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--staleness", type=int, default=1)
    options = parser.parse_args()
    if options.run_dir is not None:
        base = of_run(options.run_dir, options.groups, options.staleness)
    elif None in (options.rollout, options.score, options.train):
        parser.error("give --run-dir, or --rollout, --score and --train")
    else:
        base = Pipeline(
            options.rollout, options.score, options.train, options.publish, options.groups, options.staleness
        )
    print(f"one replica of each: {base}")
    print("| rollouts | scorers | learner processes | step, s | speed-up |")
    print("| --- | --- | --- | --- | --- |")
    first = step_seconds(base)
    for rollouts, scorers, learners in (
        (1, 1, 1),
        (2, 1, 1),
        (1, 1, 2),
        (1, 1, 4),
        (2, 1, 4),
        (2, 2, 4),
        (2, 2, 8),
        (4, 4, 16),
    ):
        seconds = step_seconds(replace(base, rollouts=rollouts, scorers=scorers, learners=learners))
        print(f"| {rollouts} | {scorers} | {learners} | {seconds:.3g} | {first / seconds:.1f} |")


if __name__ == "__main__":
    main()
