"""A whole job in one process: sample, score, learn, in turn. No services, no bus, no overlap.

    python benchmarks/single_process_loop.py examples/demo.yaml algorithm.correction=tis seed=3

The loop is that of `jackpot experiment` (jackpot.loop): the services' own code, called in turn. It serves
two ends here: to try settings quickly, and as the baseline that the pipeline is measured against. Sampling is as stale
as the job allows (``orchestrator.max_staleness``) unless ``--staleness`` says otherwise, and scoring as stale as
sampling, or less with ``--reference-age``; in the pipeline either may happen. The two differ more than it seems:
only an old reference lets the PPO clip act in the first update of a batch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from jackpot.config import load_job
from jackpot.control_plane.sessions.preparation import prepare_job
from jackpot.errors import JackpotError
from jackpot.experiment.inline import run_loop
from jackpot.loop import Loop


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("overrides", nargs="*", help="settings, e.g. algorithm.correction=tis seed=3")
    parser.add_argument("--staleness", type=int, help="batches that sampling is ahead; default: the job's maximum")
    parser.add_argument("--reference-age", type=int, help="batches that the reference is old; default: as sampling")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--json", type=Path, help="append the result to this file, one JSON object a line")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(options.threads)
    try:
        job = prepare_job(load_job(options.job, options.overrides))
        most = -(-job.orchestrator.max_staleness // job.learner.updates_per_batch)
        staleness = most if options.staleness is None else options.staleness
        reference_age = staleness if options.reference_age is None else options.reference_age
        loop = Loop(job, staleness=staleness, reference_age=reference_age)
    except JackpotError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    curve = run_loop(
        loop, on_evaluation=lambda step, accuracy: print(f"step {step:4d}  policy accuracy {accuracy:.3f}")
    )
    result = {
        "curve": curve.evaluations,
        "final_accuracy": curve.evaluations[-1][1],
        "samples_per_second": curve.num_trajectories / curve.train_seconds,
        "train_seconds": curve.train_seconds,
    }
    print(f"{result['samples_per_second']:.0f} trajectories/s")
    if options.json is not None:
        with options.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"overrides": options.overrides, **result}) + "\n")


if __name__ == "__main__":
    main()
