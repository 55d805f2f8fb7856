"""A job from its first to its last step in one process: what a study with ``execution: inline`` runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jackpot.errors import PayloadError, ScoringError
from jackpot.loop import Loop


@dataclass(frozen=True, slots=True)
class Curve:
    """What a run leaves. All times in seconds."""

    evaluations: tuple[tuple[int, float], ...]  # (optimizer step, the policy's held-out accuracy), step 0 first
    steps: tuple[Mapping[str, float], ...]  # the figures of each optimizer step, as in metrics.jsonl
    train_seconds: float  # without loading and evaluations
    num_trajectories: int  # trained on
    failure: str | None = None  # why training ended early; the last accuracy then stands for the rest


def run_loop(loop: Loop, on_evaluation: Callable[[int, float], object] = lambda step, accuracy: None) -> Curve:
    """Train a job from its first to its last step.

    Args:
        loop: not trained yet.
        on_evaluation: receives each evaluation.
    """
    job = loop.job
    evaluations, steps, seconds = list[tuple[int, float]](), list[dict[str, float]](), 0.0
    failure: str | None = None

    def evaluate(accuracy: float) -> None:
        evaluations.append((loop.step, accuracy))
        on_evaluation(*evaluations[-1])

    evaluate(loop.evaluate())
    while loop.batch < job.num_batches:
        before, started = loop.step, time.perf_counter()
        try:
            steps += loop.train_batch()
        except (ScoringError, PayloadError) as error:  # numbers that are not finite any more
            failure = str(error)
            evaluations.append((job.learner.steps, evaluations[-1][1]))
            break
        seconds += time.perf_counter() - started
        if loop.step // job.evaluation.every > before // job.evaluation.every or loop.batch == job.num_batches:
            evaluate(loop.evaluate())
    trained = loop.batch * job.learner.groups_per_batch * job.sampling.group_size
    return Curve(tuple(evaluations), tuple(steps), seconds, trained, failure)
