"""What `jackpot replay` runs: stored trajectories of a run under other settings, without training."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from jackpot.algorithm.corrections import CORRECTIONS
from jackpot.config import JobSpec, parse_job
from jackpot.errors import JackpotError
from jackpot.storage.run_directory import RunFiles

if TYPE_CHECKING:
    from jackpot.replay.replay import Replay

# What each heading shows: the first of these that there is. JSON has every column.
COLUMNS = {
    "accept": ("rollout_corr/obrs_acceptance_rate",),
    "Z": ("rollout_corr/obrs_normalizer",),
    "err Z": ("normalizer_error",),
    "KL before": ("rollout_corr/kl_before_exact", "rollout_corr/kl_before"),
    "KL after": ("rollout_corr/kl_after_exact", "rollout_corr/kl_after"),
    "ESS": ("rollout_corr/rollout_is_eff_sample_size",),
    "at c1": ("rollout_corr/clipped_fraction_c1",),
}
WITHOUT_REJECTION = {
    "KL before": ("rollout_corr/kl_before",),
    "ESS": ("rollout_corr/rollout_is_eff_sample_size",),
    "weight": ("rollout_corr/weight_mean",),
    "largest": ("rollout_corr/weight_raw_max",),
    "cut or masked": ("rollout_corr/clipped_fraction_c1",),
}


def main(arguments: list[str] | None = None) -> int:
    """Replay and print; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        job = _job(options.run_dir, options.correction, options.overrides)
        # Torch is loaded only once the settings are known to be right.
        from jackpot.replay.replay import LAMBDAS, replay

        result = replay(options.run_dir, job, options.lambdas or LAMBDAS)
    except JackpotError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.as_json:
        print(json.dumps(asdict(result)))
    else:
        print_table(result, Console())
    return 0


def print_table(result: Replay, console: Console) -> None:
    """The figures as a table, a row for each λ."""
    obrs = "obrs_lambda" in result.rows[0]
    there = {
        heading: next(name for name in names if name in result.rows[0])
        for heading, names in (COLUMNS if obrs else WITHOUT_REJECTION).items()
        if any(name in result.rows[0] for name in names)
    }
    title = f"{result.correction} on {result.num_tokens} tokens, batches {result.batches[0]} to {result.batches[-1]}"
    table = Table(box=SIMPLE, title=f"{title}; Z: {result.normalizer}" if obrs else title)
    for heading in [*(["λ"] if obrs else []), *there]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result.rows:
        first = [f"{row['obrs_lambda']:g}"] if obrs else []
        table.add_row(*first, *(f"{row[name]:.3f}" for name in there.values()))
    console.print(table)
    for note in result.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def _job(run_dir: Path, correction: str | None, overrides: list[str]) -> JobSpec:
    data = RunFiles(run_dir).job_settings("RUN_DIR")
    if correction is not None:
        overrides = [f"algorithm.correction={correction}", *overrides]
    return parse_job(data, overrides)


def _parser() -> argparse.ArgumentParser:
    about = "Stored trajectories of a run under other settings, without training."
    parser = argparse.ArgumentParser(prog="jackpot replay", description=about)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. algorithm.correction.c1=2")
    parser.add_argument("--correction", help=f"{', '.join(CORRECTIONS)}; default: the run's own")
    parser.add_argument("--lambda", dest="lambdas", type=_positive, action="append", help="a λ to try; repeatable")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
