"""How the demo's two models are made, and where they are kept. No torch: the launcher reads this.

A recipe holds everything that the models depend on. Its key is a hash of that, so that a changed recipe makes new
models, and an unchanged one finds the existing ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jackpot.config import JobSpec
from jackpot.demo.task import NUM_DIGITS
from jackpot.errors import ConfigError

PREFIX = "builtin:"
MODEL_NAMES: tuple[Literal["policy", "actor"], ...] = ("policy", "actor")
FORMAT = 1
"""Part of every key: raise it when a change of code changes the models."""

COPIED_SIZES = {"hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"}
"""Fields that a copy of the policy takes from the policy, apart from the layers dropped."""


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """One model: a Qwen3 of this shape, warmed up on examples with these habits."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    steps: int
    """Supervised warm-up steps."""
    lr: float
    slip_rate: float
    """How often a digit of an example is replaced by a random one, which makes the model less certain."""
    style_seed: int
    """Seed of the separators that this model prefers."""
    style_spread: float
    """Standard deviation of the preferences' logits: 0 uses all separators alike."""
    drop_layers: int = 0
    """Only for an actor: if above 0, the actor is a copy of the warmed-up policy without this many of its layers, the
    kept ones evenly spaced. ``steps`` then repair the copy, and its sizes are the policy's."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Two models that share a vocabulary."""

    name: str
    policy: ModelRecipe
    actor: ModelRecipe
    batch_size: int = 128
    seed: int = 0
    misread_digits: str = "37"
    """Digits that both models mostly learn wrong (10 − d instead of 9 − d), so that the most probable answer is not
    enough, and training can improve it."""
    misread_rate: float = 0.55
    num_digits: int = NUM_DIGITS
    """Digits of a number; an answer has twice as many tokens. The task's ``digits`` must be the same."""

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that change with anything in the recipe."""
        text = json.dumps({"format": FORMAT, **self.settings()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def settings(self) -> dict[str, Any]:
        """The recipe as JSON. Fields added after the first release of keys are left out at their default, so that older
        recipes keep their key, models and results."""
        settings = asdict(self)
        if self.num_digits == NUM_DIGITS:
            del settings["num_digits"]
        for name in MODEL_NAMES:
            if not self.model(name).drop_layers:
                del settings[name]["drop_layers"]
        return settings

    @staticmethod
    def of_settings(settings: Mapping[str, Any]) -> Recipe:
        """The recipe from its :meth:`settings`."""
        models: dict[str, Any] = {name: ModelRecipe(**settings[name]) for name in MODEL_NAMES}
        return Recipe(**{**settings, **models})

    @property
    def shallow_actor(self) -> ModelRecipe:
        """The actor's recipe with the sizes of the policy that it copies; only if layers are dropped."""
        sizes = {name: getattr(self.policy, name) for name in COPIED_SIZES}
        return replace(self.actor, **{**sizes, "num_layers": self.policy.num_layers - self.actor.drop_layers})

    def model(self, name: Literal["policy", "actor"]) -> ModelRecipe:
        """The recipe of one of the two models."""
        return self.policy if name == "policy" else self.actor


COMPLEMENT = Recipe(
    name="complement",
    policy=ModelRecipe(
        hidden_size=64,
        intermediate_size=192,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        steps=250,
        lr=3e-3,
        slip_rate=0.17,
        style_seed=1,
        style_spread=1.0,
    ),
    actor=ModelRecipe(
        hidden_size=32,
        intermediate_size=96,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        steps=1000,  # with half as many, some seeds give an actor that is too rarely right for training to start
        lr=1.2e-2,
        slip_rate=0.3,
        style_seed=2,
        style_spread=1.0,
    ),
)
RECIPES: Mapping[str, Recipe] = {COMPLEMENT.name: COMPLEMENT}


def cache_root(environ: Mapping[str, str] | None = None) -> Path:
    """Where built-in models are kept: ``JACKPOT_CACHE``, else ``XDG_CACHE_HOME``/jackpot, else ~/.cache/jackpot."""
    variables = os.environ if environ is None else environ
    if variables.get("JACKPOT_CACHE"):
        return Path(variables["JACKPOT_CACHE"]).expanduser().absolute()
    base = variables.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "jackpot"


def models_directory(recipe: Recipe, root: Path | None = None) -> Path:
    """The directory that holds the recipe's two models; it exists only if both are complete."""
    return (cache_root() if root is None else root) / "models" / f"{recipe.name}-{recipe.key}"


def is_builtin(model: str) -> bool:
    """Whether a model path of a job file names a built-in model."""
    return model.startswith(PREFIX)


def resolve_builtin(name: str, root: Path | None = None) -> Path:
    """``builtin:complement/policy`` → the Hugging Face directory in the cache, whether or not it exists yet.

    Raises:
        ConfigError: there is no such built-in model.
    """
    recipe, model = _parse(name)
    return models_directory(recipe, root) / model


def builtin_models_missing(job: JobSpec, root: Path | None = None) -> list[str]:
    """Names of the recipes whose models the job uses and the cache lacks. Make each with :func:`make_command`.

    Raises:
        ConfigError: the job names a built-in model that does not exist.
    """
    models = [job.policy.model] + ([] if isinstance(job.actor, str) else [job.actor.model])
    recipes = {recipe.name: recipe for recipe, _ in (_parse(model) for model in models if is_builtin(model))}
    return [name for name, recipe in recipes.items() if not models_directory(recipe, root).is_dir()]


def make_command(recipe_name: str, root: Path | None = None) -> list[str]:
    """The command that makes a recipe's models, in a separate process because it needs torch."""
    return [sys.executable, "-m", "jackpot.demo", recipe_name, str(cache_root() if root is None else root)]


def _parse(name: str) -> tuple[Recipe, str]:
    recipe_name, _, model = name.removeprefix(PREFIX).partition("/")
    if not is_builtin(name) or recipe_name not in RECIPES or model not in MODEL_NAMES:
        known = ", ".join(f"{PREFIX}{recipe}/{model}" for recipe in RECIPES for model in MODEL_NAMES)
        raise ConfigError("model", name, "is no built-in model", f"There are {known}.")
    return RECIPES[recipe_name], model
