"""Results of runs: one file for each while a study runs, one collected file to keep. No torch."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jackpot.errors import ConfigError
from jackpot.experiment.grid import Run, agrees, effective

SERIES: Mapping[str, str] = {
    "reward": "reward/mean",
    "acceptance": "rollout_corr/obrs_acceptance_rate",
    "normalizer": "rollout_corr/obrs_normalizer",
    "kl_policy_actor": "kl/policy_actor",
    "kl_before": "rollout_corr/kl_before",
    "kl_after": "rollout_corr/kl_after",
    "ess": "rollout_corr/rollout_is_eff_sample_size",
    "clipped_c1": "rollout_corr/clipped_fraction_c1",
    "weight_mean": "rollout_corr/weight_mean",
    "clip_fraction": "policy/clip_fraction",
}
"""The per-step figures to keep, by name; each is averaged between two evaluations."""

DIGITS = 5  # significant digits of every figure: beyond the noise, yet files stay small


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one run."""

    key: str
    seed: int
    evaluations: tuple[tuple[int, float], ...]  # (optimizer step, the policy's held-out accuracy), step 0 first
    series: Mapping[str, Sequence[float | None]]  # one figure for each evaluation but the first
    seconds: float  # CPU seconds of inline training, wall seconds of a pipeline's run
    failure: str | None  # why training ended early
    settings: Mapping[str, Any] = field(repr=False)


def make_result(
    run: Run,
    evaluations: Sequence[tuple[int, float]],
    steps: Sequence[Mapping[str, float]],
    seconds: float,
    failure: str | None,
) -> Result:
    """A result from a run's measurements.

    Args:
        run: the run.
        evaluations: (optimizer step, accuracy), step 0 first.
        steps: the rows of metrics.jsonl, each with its ``step``.
        seconds: its duration.
        failure: why training ended early, if it did.
    """
    bounds = [step for step, _ in evaluations]
    series: dict[str, list[float | None]] = {}
    for name, column in SERIES.items():
        if not any(column in row for row in steps):
            continue
        series[name] = []
        for low, high in itertools.pairwise(bounds):
            values = [row[column] for row in steps if low < row["step"] <= high and column in row]
            series[name].append(_rounded(sum(values) / len(values)) if values else None)
    points = tuple((int(step), _rounded(accuracy)) for step, accuracy in evaluations)
    return Result(run.key, run.job.seed, points, series, round(seconds, 1), failure, run.settings())


def write_result(directory: Path, result: Result) -> None:
    """Write a run's file atomically: aside, then renamed."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_aside(directory / f"{result.key}.json", json.dumps(asdict(result)) + "\n")


def read_results(directory: Path) -> dict[str, Result]:
    """Every run's file in a directory, by key. Incomplete files of a killed process have another suffix."""
    run_results = (_result(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(directory.glob("*.json")))
    return {result.key: result for result in run_results}


def write_collection(path: Path, results: Iterable[Result]) -> None:
    """Write results into one file, each set of settings once: the first in full, the others as differences."""
    distinct: list[Mapping[str, Any]] = []
    runs = []
    for result in sorted(results, key=lambda result: (result.seed, result.key)):
        if result.settings not in distinct:
            distinct.append(result.settings)
        runs.append({**asdict(result), "settings": distinct.index(result.settings)})
    written = [distinct[0], *(_changes(distinct[0], each) for each in distinct[1:])] if distinct else []
    blocks = [",\n  ".join(json.dumps(each) for each in part) for part in (written, runs)]
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_aside(path, f'{{"settings": [\n  {blocks[0]}\n], "runs": [\n  {blocks[1]}\n]}}\n')


def read_collection(path: Path) -> dict[str, Result]:
    """The results in a file of :func:`write_collection`, by key; empty if there is no such file.

    Raises:
        ConfigError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        first, *others = data["settings"] or [{}]
        settings = [first, *(_changed(first, changes) for changes in others)]
        run_results = [_result({**run, "settings": settings[run["settings"]]}) for run in data["runs"]]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        problem = f"is damaged ({type(error).__name__}: {error})"
        raise ConfigError("results", str(path), problem, "Restore it, or delete it to run the study again.") from None
    return {result.key: result for result in run_results}


def find(results: Mapping[str, Result], run: Run) -> Result | None:
    """The run's result, if it has been made with exactly these settings."""
    result = results.get(run.key)
    if result is None or not agrees(effective(result.settings), effective(run.settings())):
        return None
    return result


def _result(data: Mapping[str, Any]) -> Result:
    points = tuple((int(step), float(accuracy)) for step, accuracy in data["evaluations"])
    return Result(**{**data, "evaluations": points})


def _changes(base: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Differences by dotted path. Mappings whose keys differ are replaced as a whole; the path "" is everything."""
    if base.keys() != other.keys():
        return {prefix.removesuffix("."): other}
    changes: dict[str, Any] = {}
    for name, value in other.items():
        mine = base[name]
        if isinstance(mine, Mapping) and isinstance(value, Mapping):
            changes |= _changes(mine, value, f"{prefix}{name}.")
        elif mine != value:
            changes[prefix + name] = value
    return changes


def _changed(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`_changes`."""
    whole: dict[str, Any] = json.loads(json.dumps(base))
    for path, value in changes.items():
        if not path:
            return dict(value)
        *parents, leaf = path.split(".")
        node = whole
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return whole


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _write_aside(path: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
