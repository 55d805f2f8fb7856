"""Names, keys and places of the built-in models. No torch."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jackpot.config import JobSpec, load_job, parse_job
from jackpot.demo.recipe import (
    COMPLEMENT,
    builtin_models_missing,
    cache_root,
    make_command,
    models_directory,
    resolve_builtin,
)
from jackpot.errors import ConfigError

DEMO = Path(__file__).parents[3] / "examples" / "demo.yaml"


def _job(policy: str, actor: str) -> JobSpec:
    models = {"policy": {"model": policy}, "actor": {"model": actor}}
    return parse_job({**models, "task": {"name": "complement"}})


def test_the_key_changes_with_anything_in_the_recipe() -> None:
    changed = [
        replace(COMPLEMENT, seed=1),
        replace(COMPLEMENT, misread_rate=0.5),
        replace(COMPLEMENT, policy=replace(COMPLEMENT.policy, steps=1)),
        replace(COMPLEMENT, actor=replace(COMPLEMENT.actor, style_seed=9)),
    ]
    assert len({COMPLEMENT.key, *(recipe.key for recipe in changed)}) == 5
    assert replace(COMPLEMENT).key == COMPLEMENT.key


@pytest.mark.parametrize(
    ("environ", "root"),
    [
        ({"JACKPOT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/jackpot")),
        ({}, Path.home() / ".cache" / "jackpot"),
    ],
)
def test_the_cache_is_where_the_environment_says(environ: dict[str, str], root: Path) -> None:
    assert cache_root(environ) == root


def test_builtin_names_resolve_into_the_cache(tmp_path: Path) -> None:
    directory = models_directory(COMPLEMENT, tmp_path)
    assert directory.parent == tmp_path / "models"
    assert resolve_builtin("builtin:complement/policy", tmp_path) == directory / "policy"
    assert resolve_builtin("builtin:complement/actor", tmp_path) == directory / "actor"


@pytest.mark.parametrize("name", ["builtin:complement/critic", "builtin:other/policy", "complement/policy", "builtin:"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="builtin:complement/policy, builtin:complement/actor"):
        resolve_builtin(name, tmp_path)


def test_missing_models_are_named_once_and_only_if_used(tmp_path: Path) -> None:
    demo = load_job(DEMO)
    assert builtin_models_missing(demo, tmp_path) == ["complement"]
    assert builtin_models_missing(load_job(DEMO, ["actor=policy"]), tmp_path) == ["complement"]
    assert builtin_models_missing(_job("/models/a", "/models/b"), tmp_path) == []
    models_directory(COMPLEMENT, tmp_path).mkdir(parents=True)
    assert builtin_models_missing(demo, tmp_path) == []


def test_the_command_makes_the_recipe_in_the_cache(tmp_path: Path) -> None:
    assert make_command("complement", tmp_path) == [sys.executable, "-m", "jackpot.demo", "complement", str(tmp_path)]


def test_a_wrong_command_line_says_how_it_goes() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "jackpot.demo", "complment", "/nowhere"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr == "usage: python -m jackpot.demo {complement} CACHE_DIRECTORY\n"


def test_task_and_recipe_need_no_torch() -> None:
    code = "import sys, jackpot.demo.recipe, jackpot.demo.task; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
