"""The study file: one job under several settings and seeds, with its metrics declared in advance. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, model_validator
from pydantic_core import ErrorDetails

from jackpot.config import InvalidJobError, JobSpec, parse_job
from jackpot.config.loading import read_yaml
from jackpot.demo.recipe import COPIED_SIZES, RECIPES, ModelRecipe, Recipe
from jackpot.demo.task import MAX_DIGITS, NUM_DIGITS
from jackpot.errors import ConfigError
from jackpot.section import Fraction, NonNegativeInt, Number, Section

MAX_STUDY_BYTES = 1 << 20
Name = Annotated[str, Field(pattern=r"^\w[\w .,+=()/:-]{0,60}$")]
Seed = Annotated[int, Field(ge=0, lt=2**31), Number]
Settings = tuple[str, ...]


class ModelsConfig(Section):
    """Models that are warmed up separately for each seed, from a built-in recipe. Without this section every run starts
    from the job file's own models, and seeds differ only in training."""

    recipe: str = "complement"
    """Which built-in recipe."""
    policy: dict[str, int | float] = Field(default_factory=dict)
    """Changes of the recipe's policy, e.g. ``{steps: 400}``."""
    actor: dict[str, int | float] = Field(default_factory=dict)
    """Changes of the recipe's actor, e.g. ``{hidden_size: 16, num_layers: 1}``, or ``{drop_layers: 2}`` for a
    copy of the policy without two of its layers."""
    num_digits: Annotated[int, Field(ge=NUM_DIGITS, le=MAX_DIGITS)] = NUM_DIGITS
    """Digits of the numbers, for longer answers; ``task.params.digits`` of the job must be the same."""
    misread_rate: Fraction | None = None
    """How often the misread digits are wrong in the warm-up's examples; null keeps the recipe's."""

    @model_validator(mode="after")
    def _known(self) -> ModelsConfig:
        if self.recipe not in RECIPES:
            raise ValueError(f"recipe = {self.recipe!r} is no built-in recipe. Use one of {', '.join(RECIPES)}")
        known = {field.name for field in fields(ModelRecipe)}
        for name in [*self.policy, *self.actor]:
            if name not in known:
                raise ValueError(f"{name!r} is no setting of a model's recipe. Known here: {', '.join(sorted(known))}")
        self._check_dropped_layers()
        return self

    def _check_dropped_layers(self) -> None:
        if "drop_layers" in self.policy:
            raise ValueError("policy.drop_layers has no effect. Give it to the actor, which is then the policy's copy")
        if self.actor.get("drop_layers") and (sizes := sorted(COPIED_SIZES & set(self.actor))):
            raise ValueError(
                f"actor.{sizes[0]} has no effect beside drop_layers. Leave it out: the policy says its sizes"
            )

    def merged(self, other: ModelsConfig | None) -> ModelsConfig:
        """This section with another one's settings on top."""
        if other is None:
            return self
        chosen = {name: getattr(other, name) for name in other.model_fields_set}
        models = {"policy": {**self.policy, **other.policy}, "actor": {**self.actor, **other.actor}}
        return ModelsConfig(**{**self.model_dump(), **chosen, **models})

    def for_seed(self, seed: int) -> Recipe:
        """The recipe of one seed.

        Raises:
            ConfigError: the actor would have no layers.
        """
        recipe = RECIPES[self.recipe]
        changed: dict[str, Any] = {"policy": self.policy, "actor": self.actor}
        models: dict[str, Any] = {name: replace(recipe.model(name), **changed[name]) for name in ("policy", "actor")}
        dropped, layers = models["actor"].drop_layers, models["policy"].num_layers
        if not 0 <= dropped < layers:
            raise ConfigError("models.actor.drop_layers", dropped, f"of {layers} layers leaves none", "Drop fewer.")
        rate = recipe.misread_rate if self.misread_rate is None else self.misread_rate
        return replace(recipe, seed=seed, num_digits=self.num_digits, misread_rate=rate, **models)


class InlineConfig(Section):
    """How old weights are in runs of ``execution: inline``; there it is exact."""

    staleness: NonNegativeInt = 1
    """Batches between the weights that sample and the trained weights. 1 is the pipeline's default."""
    reference_age: NonNegativeInt = 0
    """Batches between the weights that score and the trained weights, as in a job's ``scorer.reference_age``. 0 is the
    paper's: the reference is the policy as the batch begins."""


class ArmConfig(Section):
    """One of the arms compared."""

    settings: Settings = ()
    """Settings of the job, ``key=value`` as on the command line; they come last and override the others."""
    models: ModelsConfig | None = None
    """Changes of the models."""
    inline: InlineConfig | None = None
    """Other ages of the weights than the study's; null keeps them."""


class PhaseConfig(Section):
    """Runs that belong together: arms × variants × seeds."""

    purpose: Literal["search", "confirmation", "ablation"]
    """``search`` chooses, ``confirmation`` reports on seeds that no search has used, ``ablation`` varies one thing."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    """A seed determines warm-up, prompts, sampling, masks and training."""
    arms: tuple[Name, ...] | None = None
    """Which arms; null is all."""
    variants: tuple[Name, ...] | None = None
    """Which variants; null is the plain job, without any variant's settings."""
    compare_to: Name | None = None
    """The reference arm of differences, seed by seed; null is the study's."""


class DipConfig(Section):
    """What counts as a dip."""

    below: Fraction = 0.3
    """Held-out accuracy."""
    after_step: NonNegativeInt = 20
    """Evaluations up to this step do not count: every run begins low."""


class MetricsConfig(Section):
    """The metrics, declared before they are measured."""

    primary: Literal["area", "final"] = "area"
    """``area``: the policy's held-out accuracy averaged over training, by the trapezoidal rule between evaluations.
    ``final``: at the last step. The other one is reported, too."""
    dip: DipConfig = DipConfig()
    """A dip: the accuracy falls below a threshold late in training. The share of runs with one is reported, too."""
    interval: Literal["t", "bootstrap"] = "t"
    """How 95 % intervals of means are computed."""


class StudyConfig(Section):
    """The study file."""

    title: str
    """Headline of the report."""
    job: str
    """The base job file, relative to the study file."""
    settings: Settings = ()
    """Settings of the job for all runs."""
    models: ModelsConfig | None = None
    """Models made separately for each seed."""
    execution: Literal["inline", "pipeline"] = "inline"
    """``inline``: all parts in one process, in turn, reproducible. ``pipeline``: `jackpot run`, every service."""
    inline: InlineConfig = InlineConfig()
    """Only for ``execution: inline``."""
    arms: Annotated[dict[Name, ArmConfig], Field(min_length=1)]
    """The arms compared, in the order of the report."""
    variants: dict[Name, ArmConfig] = Field(default_factory=dict)
    """Changes of the job that all arms share: other sizes, learning rates, tasks."""
    phases: Annotated[dict[Name, PhaseConfig], Field(min_length=1)]
    """The phases, in the order in which they run."""
    compare_to: Name
    """The reference arm of differences, seed by seed."""
    metrics: MetricsConfig = MetricsConfig()
    """The metrics."""
    notes: str | None = None
    """A Markdown file, relative to the study file, that begins the report: the findings and their interpretation."""

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        self._require_arm("compare_to", self.compare_to)
        for name, phase in self.phases.items():
            if len(set(phase.seeds)) < len(phase.seeds):
                raise ValueError(f"phases.{name}.seeds has a seed twice. Write each once")
            for arm in phase.arms or ():
                self._require_arm(f"phases.{name}.arms", arm)
            for variant in phase.variants or ():
                if variant not in self.variants:
                    known = ", ".join(self.variants) or "none"
                    raise ValueError(f"phases.{name}.variants names {variant!r}, which is not there. Known: {known}")
            compared = phase.compare_to or self.compare_to
            self._require_arm(f"phases.{name}.compare_to", compared)
        self._require_fresh_seeds()
        return self

    def _require_arm(self, where: str, arm: str) -> None:
        if arm not in self.arms:
            raise ValueError(f"{where} names the arm {arm!r}, which is not there. Known: {', '.join(self.arms)}")

    def _require_fresh_seeds(self) -> None:
        searched = {s for phase in self.phases.values() if phase.purpose == "search" for s in phase.seeds}
        for name, phase in self.phases.items():
            if phase.purpose == "confirmation" and (seen := searched & set(phase.seeds)):
                raise ValueError(
                    f"phases.{name}.seeds has seeds of a search ({', '.join(map(str, sorted(seen)))}), and what was "
                    "chosen on seeds cannot be confirmed with them. Use fresh ones"
                )


@dataclass(frozen=True, slots=True)
class Study:
    """A study file, read."""

    path: Path
    config: StudyConfig
    base: Mapping[str, Any]  # the job file's settings, not yet validated

    @property
    def name(self) -> str:
        """The file's name without its ending: the name of the report."""
        return self.path.stem

    @property
    def job_path(self) -> Path:
        """The base job file."""
        return (self.path.parent / self.config.job).resolve()

    def job(self, variant: str | None, arm: str, seed: int) -> JobSpec:
        """The job of one run; without models that are made for the seed.

        Raises:
            ConfigError: a setting cannot work; names the arm.
        """
        config = self.config
        ours = config.variants[variant].settings if variant is not None else ()
        overrides = [*config.settings, *ours, *config.arms[arm].settings, f"seed={seed}"]
        try:
            return parse_job(self.base, overrides, base=self.job_path.parent)
        except InvalidJobError as error:
            where = arm if variant is None else f"{variant}, {arm}"
            raise ConfigError(f"{error.field} (arm {where})", error.value, error.problem, error.remedy) from None

    def inline(self, variant: str | None, arm: str) -> InlineConfig:
        """The ages of the weights in the runs of an arm."""
        config = self.config
        ours = config.variants[variant].inline if variant is not None else None
        return config.arms[arm].inline or ours or config.inline

    def recipe(self, variant: str | None, arm: str, seed: int) -> Recipe | None:
        """The recipe of one run's models; None if the job file names them."""
        config = self.config
        layers = [config.models, config.variants[variant].models if variant is not None else None]
        models: ModelsConfig | None = None
        for layer in [*layers, config.arms[arm].models]:
            models = layer if models is None else models.merged(layer)
        return None if models is None else models.for_seed(seed)


def load_study(path: Path) -> Study:
    """Read a study file, and the job file that it names.

    Raises:
        ConfigError: a file cannot be read, or a setting of the study cannot work.
    """
    try:
        config = StudyConfig.model_validate(_read("study file", path))
    except pydantic.ValidationError as error:
        raise _problem(error.errors()) from None
    return Study(path, config, _read("job", (path.parent / config.job).resolve()))


def _read(field: str, path: Path) -> Mapping[str, Any]:
    remedy = "Give the path of a YAML file; docs/experiments has examples."
    try:
        if path.stat().st_size > MAX_STUDY_BYTES:
            raise ConfigError(field, str(path), "is larger than 1 MiB", remedy)
        return read_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(field, str(path), f"cannot be read ({error})", remedy) from None
    except InvalidJobError as error:
        raise ConfigError(field, str(path), error.problem, "Correct the file.") from None


def _problem(details: Sequence[ErrorDetails]) -> ConfigError:
    detail = details[0]
    field = ".".join(str(part) for part in detail["loc"]) or "study file"
    if detail["type"] == "extra_forbidden":
        return ConfigError(field, detail["input"], "unknown key", "Look for a slip; docs/experiments has examples.")
    if detail["type"] == "missing":
        return ConfigError(field, None, "is required", f"Add {field} to the study file.")
    message = detail["msg"].removeprefix("Value error, ")
    problem, dot, remedy = message.rpartition(". ")
    value = detail["input"] if not isinstance(detail["input"], dict) else "…"
    if detail["type"] == "value_error" and dot:
        return ConfigError(field, value, problem, remedy + ".")
    return ConfigError(field, value, message[0].lower() + message[1:], "Correct it; docs/experiments has examples.")
