"""The study file: what it refuses, and which runs it stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from jackpot.demo.recipe import Recipe
from jackpot.errors import ConfigError
from jackpot.experiment.grid import Cell, agrees, make_run, runs_of
from jackpot.experiment.study import Study, load_study

JOB = {
    "policy": {"model": "builtin:complement/policy"},
    "actor": {"model": "builtin:complement/actor"},
    "task": {"name": "complement"},
}


def study_data(**changes: Any) -> dict[str, Any]:
    return {
        "title": "A study",
        "job": "job.yaml",
        "settings": ["learner.steps=4"],
        "arms": {"tis": {"settings": ["algorithm.correction=tis"]}, "jackpot": {}},
        "phases": {"main": {"purpose": "confirmation", "seeds": [11, 12]}},
        "compare_to": "tis",
    } | changes


def write_study(directory: Path, **changes: Any) -> Path:
    (directory / "job.yaml").write_text(yaml.safe_dump(JOB))
    path = directory / "study.yaml"
    path.write_text(yaml.safe_dump(study_data(**changes), sort_keys=False))
    return path


def read(directory: Path, **changes: Any) -> Study:
    return load_study(write_study(directory, **changes))


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"arm": {}}, "arm", "unknown key"),
        ({"phases": {"p": {"purpose": "confirmation", "seeds": []}}}, "phases.p.seeds", "at least 1 item"),
        ({"phases": {"p": {"purpose": "confirmation", "seeds": [1, 1]}}}, "study file", "has a seed twice"),
        ({"phases": {"p": {"purpose": "maybe", "seeds": [1]}}}, "phases.p.purpose", "'search', 'confirmation'"),
        ({"phases": {"p": {"purpose": "search", "seeds": [1], "arms": ["x"]}}}, "study file", "names the arm 'x'"),
        ({"phases": {"p": {"purpose": "search", "seeds": [1], "variants": ["x"]}}}, "study file", "Known: none"),
        ({"compare_to": "nobody"}, "study file", "compare_to names the arm 'nobody'"),
        ({"models": {"recipe": "none"}}, "models", "is no built-in recipe"),
        ({"models": {"actor": {"width": 3}}}, "models", "'width' is no setting of a model's recipe"),
        ({"models": {"policy": {"drop_layers": 1}}}, "models", "policy.drop_layers has no effect"),
        ({"models": {"actor": {"drop_layers": 1, "head_dim": 8}}}, "models", "actor.head_dim has no effect beside"),
        ({"models": {"num_digits": 15}}, "models.num_digits", "less than or equal to 14"),
        ({"metrics": {"dip": {"below": 2}}}, "metrics.dip.below", "less than or equal to 1"),
    ],
)
def test_a_bad_study_file_names_the_field(tmp_path: Path, changes: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, **changes)
    assert caught.value.field == field
    assert message in str(caught.value)


def test_a_confirmation_may_not_use_the_seeds_of_a_search(tmp_path: Path) -> None:
    phases = {
        "look": {"purpose": "search", "seeds": [1, 2]},
        "main": {"purpose": "confirmation", "seeds": [2, 3]},
    }
    with pytest.raises(ConfigError, match=r"phases\.main\.seeds has seeds of a search \(2\)"):
        read(tmp_path, phases=phases)
    phases["main"]["purpose"] = "ablation"
    assert read(tmp_path, phases=phases).config.phases["main"].seeds == (2, 3)


def test_no_study_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"study file = .*cannot be read"):
        load_study(tmp_path / "nothing.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"study file = .*is not a mapping"):
        load_study(path)


def test_a_setting_that_cannot_work_names_the_arm(tmp_path: Path) -> None:
    study = read(tmp_path, arms={"tis": {"settings": ["algorithm.correction=tiss"]}})
    with pytest.raises(ConfigError, match=r"algorithm\.correction\.name \(arm tis\) = 'tiss': unknown name"):
        runs_of(study)


def test_the_grid_is_phases_by_variants_by_arms_by_seeds_and_later_settings_win(tmp_path: Path) -> None:
    study = read(
        tmp_path,
        settings=["learner.steps=4", "learner.lr=1e-3"],
        variants={"fast": {"settings": ["learner.lr=2e-3"], "inline": {"staleness": 3}}, "plain": {}},
        arms={"tis": {"settings": ["algorithm.correction=tis"]}, "slow": {"settings": ["learner.lr=5e-4"]}},
        phases={"main": {"purpose": "search", "seeds": [11, 12], "variants": ["fast", "plain"]}},
    )
    runs = runs_of(study)
    assert list(runs) == [Cell("main", v, a) for v in ("fast", "plain") for a in ("tis", "slow")]
    rates = {cell: [run.job.learner.lr for run in found] for cell, found in runs.items()}
    assert rates == dict(zip(runs, ([2e-3] * 2, [5e-4] * 2, [1e-3] * 2, [5e-4] * 2), strict=True))
    assert [run.job.seed for run in runs[Cell("main", "fast", "tis")]] == [11, 12]
    assert [found[0].staleness for found in runs.values()] == [3, 3, 1, 1]
    assert runs[Cell("main", "fast", "slow")][0].job.learner.steps == 4
    # "slow" overrides what the variants change, but not how old the weights are: four distinct runs a seed.
    assert len({run.key for found in runs.values() for run in found}) == 8


def test_the_key_changes_with_every_setting_and_with_nothing_else(tmp_path: Path) -> None:
    cell = Cell("main", None, "tis")

    def key(seed: int = 11, **changes: Any) -> str:
        return make_run(read(tmp_path, **changes), cell, seed).key

    plain = key()
    assert key() == plain
    assert key(title="Another name", notes="x.md") == plain
    assert key(arms={"tis": {"settings": ["algorithm.correction=tis"]}}) == plain
    assert key(settings=["learner.steps=4", "run.threads_per_process=3", "bus.lease_seconds=9"]) == plain
    different = [
        key(seed=12),
        key(settings=["learner.steps=5"]),
        key(execution="pipeline"),
        key(inline={"staleness": 2}),
        key(inline={"staleness": 1, "reference_age": 1}),
        key(models={}),
        key(models={"actor": {"steps": 7}}),
        key(models={"actor": {"drop_layers": 1}}),
        key(models={"misread_rate": 0.2}),
        key(models={"num_digits": 8}, settings=["learner.steps=4", "task.params.digits=8"]),
        key(arms={"tis": {"settings": ["algorithm.correction={name: tis, cap: 3}"]}}),
    ]
    assert len({plain, *different}) == 1 + len(different)


def test_models_are_made_for_the_seed_and_arms_may_change_them(tmp_path: Path) -> None:
    study = read(
        tmp_path,
        models={"policy": {"steps": 9}, "actor": {"hidden_size": 16}},
        arms={"tis": {"models": {"actor": {"num_layers": 2}}}, "jackpot": {}},
    )
    changed, plain = (study.recipe(None, arm, 11) for arm in ("tis", "jackpot"))
    assert changed is not None and plain is not None
    assert (plain.seed, plain.policy.steps, plain.actor.hidden_size, plain.actor.num_layers) == (11, 9, 16, 1)
    assert (changed.actor.hidden_size, changed.actor.num_layers) == (16, 2)
    assert len({changed.key, plain.key}) == 2
    assert read(tmp_path).recipe(None, "tis", 11) is None


def test_a_variant_changes_only_what_it_names_of_the_models(tmp_path: Path) -> None:
    study = read(
        tmp_path,
        models={"num_digits": 8, "misread_rate": 0.2, "policy": {"num_layers": 4}, "actor": {"drop_layers": 1}},
        variants={"shallower": {"models": {"actor": {"drop_layers": 3}}}, "longer": {"models": {"num_digits": 10}}},
    )
    plain, shallower, longer = (study.recipe(name, "tis", 11) for name in (None, "shallower", "longer"))
    assert plain is not None and shallower is not None and longer is not None
    assert (plain.num_digits, plain.misread_rate, plain.shallow_actor.num_layers) == (8, 0.2, 3)
    assert (shallower.num_digits, shallower.misread_rate, shallower.shallow_actor.num_layers) == (8, 0.2, 1)
    assert (longer.num_digits, longer.misread_rate, longer.shallow_actor.hidden_size) == (10, 0.2, 64)
    assert Recipe.of_settings(json.loads(json.dumps(longer.settings()))) == longer


def test_models_that_cannot_be_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models\.actor\.drop_layers = 2: of 2 layers leaves none"):
        runs_of(read(tmp_path, models={"actor": {"drop_layers": 2}}))
    with pytest.raises(ConfigError, match=r"task\.params\.digits = 6: is not models\.num_digits = 8"):
        runs_of(read(tmp_path, models={"num_digits": 8}))


def test_settings_agree_where_both_know_them() -> None:
    stored = {"job": {"learner": {"lr": 1e-3, "steps": 4}}, "execution": "inline"}
    assert agrees(stored, stored | {"new": 1})
    assert agrees(stored, {"job": {"learner": {"lr": 1e-3, "steps": 4, "packing": True}}, "execution": "inline"})
    assert not agrees(stored, {"job": {"learner": {"lr": 2e-3, "steps": 4}}, "execution": "inline"})
