"""Expands a study into its runs, each with a key by which finished runs are found. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jackpot.config import JobSpec
from jackpot.demo.recipe import Recipe
from jackpot.demo.task import NUM_DIGITS
from jackpot.errors import ConfigError
from jackpot.experiment.study import PhaseConfig, Study

FORMAT = 1
"""Part of every key: raise it when a change of code changes results."""

SECTIONS = ("policy", "actor", "task", "sampling", "algorithm", "rollout", "learner", "evaluation")
"""The sections of a job that determine its result. The others say where it runs and what it keeps."""


INERT: Mapping[str, tuple[str, ...]] = {
    "rollout": ("engine", "replicas", "device", "max_batch_size", "max_queue", "weight_poll_seconds", "vllm"),
    "learner": ("device", "max_batch_tokens", "checkpoint_every", "keep_checkpoints", "batch_timeout_seconds"),
    "evaluation": ("timeout_seconds",),
    "task": ("reward_timeout_seconds", "reward_attempts"),
}
"""Settings of these sections that only affect place, speed and timeouts."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a study; its runs differ in their seed."""

    phase: str
    variant: str | None
    arm: str


@dataclass(frozen=True)
class Run:
    """One training run. Two with the same key are the same run, in any cell."""

    job: JobSpec
    recipe: Recipe | None
    execution: str
    staleness: int
    reference_age: int

    @cached_property
    def key(self) -> str:
        """Sixteen hexadecimal digits that change with any explicit setting."""
        text = json.dumps({"format": FORMAT, **self.request(), "job": self._chosen()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def request(self) -> dict[str, Any]:
        """The run as JSON, for the worker process."""
        return {
            "job": self.job.model_dump(mode="json", exclude_unset=True),
            "recipe": None if self.recipe is None else self.recipe.settings(),
            "execution": self.execution,
            "staleness": self.staleness,
            "reference_age": self.reference_age,
        }

    def settings(self) -> dict[str, Any]:
        """All settings that determine the result, with defaults, without the seed."""
        job = self.job.model_dump(mode="json", include=set(SECTIONS))
        if "evaluation" in job:
            job["evaluation"]["temperature"] = self.job.evaluation_temperature
        recipe = None if self.recipe is None else {k: v for k, v in self.recipe.settings().items() if k != "seed"}
        ages = {"staleness": self.staleness, "reference_age": self.reference_age}
        return {"job": job, "recipe": recipe, "execution": self.execution, **ages}

    def _chosen(self) -> dict[str, Any]:
        # Only explicit settings: one that Jackpot adds later must not change the key of every stored result.
        # Comparing `settings` shows whether a default changed.
        chosen = self.job.model_dump(mode="json", exclude_unset=True, include={*SECTIONS, "seed"})
        # If models are made for the seed, the recipe determines them.
        return chosen if self.recipe is None else {k: v for k, v in chosen.items() if k != "policy"}


def runs_of(study: Study) -> dict[Cell, list[Run]]:
    """All runs of a study, cell by cell, seeds in the order of the file.

    Raises:
        ConfigError: a setting of an arm cannot work.
    """
    runs_by_cell: dict[Cell, list[Run]] = {}
    for name, phase in study.config.phases.items():
        for cell in _cells(study, name, phase):
            runs_by_cell[cell] = [make_run(study, cell, seed) for seed in phase.seeds]
    return runs_by_cell


def make_run(study: Study, cell: Cell, seed: int) -> Run:
    """One run of a cell.

    Raises:
        ConfigError: a setting of the arm cannot work, or task and models use numbers of different lengths.
    """
    inline, recipe = study.inline(cell.variant, cell.arm), study.recipe(cell.variant, cell.arm, seed)
    job = study.job(cell.variant, cell.arm, seed)
    digits = job.task.params.get("digits", NUM_DIGITS)
    if recipe is not None and digits != recipe.num_digits:
        remedy = f"Set both task.params.digits and models.num_digits to {digits}, or to {recipe.num_digits}."
        raise ConfigError("task.params.digits", digits, f"is not models.num_digits = {recipe.num_digits}", remedy)
    return Run(
        job=job,
        recipe=recipe,
        execution=study.config.execution,
        staleness=inline.staleness,
        reference_age=inline.reference_age,
    )


def agrees(stored: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    """Whether two sets of settings agree on every setting that both have."""
    for name in stored.keys() & current.keys():
        mine, theirs = stored[name], current[name]
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            if not agrees(mine, theirs):
                return False
        elif mine != theirs:
            return False
    return True


def effective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """:meth:`Run.settings` without settings that have no effect, so that a new default of one changes no run."""
    copy: dict[str, Any] = json.loads(json.dumps(settings))
    job = copy.get("job", {})
    algorithm = job.get("algorithm", {})
    correction, distillation = algorithm.get("correction", {}), algorithm.get("distillation", {})
    _without(distillation, ["chunk_tokens"])
    if distillation.get("kl_target") is None:
        _without(distillation, ["weight_min", "weight_max", "proportional_gain", "integral_gain", "kl_smoothing"])
    if correction.get("acceptance_rate") is None:
        _without(correction, ["lambda_smoothing", "lambda_min", "lambda_max"])
    if correction.get("target") != "policy":
        _without(correction, ["c2"])
    if not algorithm.get("kl_penalty", {}).get("weight"):
        algorithm.pop("kl_penalty", None)
    for section, names in INERT.items():
        _without(job.get(section, {}), names)
    return copy


def _without(section: dict[str, Any], names: Sequence[str]) -> None:
    for name in names:
        section.pop(name, None)


def _cells(study: Study, name: str, phase: PhaseConfig) -> list[Cell]:
    variants: tuple[str | None, ...] = phase.variants or (None,)
    return [Cell(name, variant, arm) for variant in variants for arm in phase.arms or tuple(study.config.arms)]
