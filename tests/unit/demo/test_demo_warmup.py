"""Making the models: two loadable directories, made once, also when several processes want them."""

import json
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from jackpot.compute.model_loading import load_causal_lm
from jackpot.demo.recipe import COMPLEMENT, Recipe, models_directory
from jackpot.demo.warmup import make_models

TINY = replace(COMPLEMENT, policy=replace(COMPLEMENT.policy, steps=3), actor=replace(COMPLEMENT.actor, steps=3))

MAKE_TINY = """
import sys
from dataclasses import replace
from pathlib import Path
from jackpot.demo.recipe import COMPLEMENT
from jackpot.demo.warmup import make_models
steps = int(sys.argv[2])
recipe = replace(COMPLEMENT, policy=replace(COMPLEMENT.policy, steps=steps), actor=replace(COMPLEMENT.actor, steps=3))
print("ready", flush=True)
sys.stdin.readline()
print(make_models(recipe, Path(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(TINY, tmp_path_factory.mktemp("cache"))


def test_both_models_load_and_share_a_vocabulary(made: Path) -> None:
    models = {name: load_causal_lm(made / name, "float32", "cpu") for name in ("policy", "actor")}
    assert {model.config.vocab_size for model in models.values()} == {40}
    assert models["policy"].num_parameters() == 101_248
    assert models["policy"].num_parameters() >= 5 * models["actor"].num_parameters()
    for name, model in models.items():
        tokenizer = AutoTokenizer.from_pretrained(made / name)
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (1, 0)
        assert tokenizer.eos_token_id == model.config.eos_token_id == 1
        assert torch.isfinite(model(torch.tensor([tokenizer("999999-381592=")["input_ids"]])).logits).all()
    vocabularies = [json.loads((made / name / "tokenizer.json").read_text()) for name in models]
    assert vocabularies[0] == vocabularies[1]


def test_other_users_of_the_machine_may_read_the_models(made: Path) -> None:
    assert stat.S_IMODE(made.stat().st_mode) == 0o755
    assert {path.name for path in made.iterdir()} == {"policy", "actor", "recipe.json"}


def test_models_that_are_there_are_used_again(made: Path) -> None:
    before = (made / "policy" / "model.safetensors").stat().st_mtime_ns
    assert make_models(TINY, made.parents[1]) == made
    assert (made / "policy" / "model.safetensors").stat().st_mtime_ns == before


def test_the_same_recipe_makes_the_same_weights(made: Path, tmp_path: Path) -> None:
    again = make_models(TINY, tmp_path)
    assert again.name == made.name
    for name in ("policy", "actor"):
        assert (again / name / "model.safetensors").read_bytes() == (made / name / "model.safetensors").read_bytes()


def test_recipes_of_before_keep_their_key() -> None:
    """The key names the cache's directories, and studies' results."""
    assert COMPLEMENT.key == "7d567460506ee8d3"


def test_a_shallow_actor_is_the_policy_without_layers(tmp_path: Path) -> None:
    recipe = replace(
        TINY,
        policy=replace(TINY.policy, num_layers=4),
        actor=replace(TINY.actor, drop_layers=2, steps=0),
        num_digits=10,
    )
    made = make_models(recipe, tmp_path)
    policy, actor = (load_causal_lm(made / name, "float32", "cpu").state_dict() for name in ("policy", "actor"))
    assert {name.split(".")[2] for name in actor if name.startswith("model.layers.")} == {"0", "1"}
    for name, tensor in actor.items():
        source = name.replace("model.layers.1.", "model.layers.3.")  # the first and the last of four
        assert torch.equal(tensor, policy[source]), name


def test_a_warm_up_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    broken = replace(TINY, actor=replace(TINY.actor, num_heads=3))
    with pytest.raises((ValueError, RuntimeError)):
        make_models(broken, tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [f"complement-{broken.key}.lock"]


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    steps = 12
    recipe: Recipe = replace(TINY, policy=replace(TINY.policy, steps=steps))
    command = [sys.executable, "-c", MAKE_TINY, str(tmp_path), str(steps)]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    directory = models_directory(recipe, tmp_path)
    assert [output for output, _ in results] == [f"{directory}\n"] * 2
    # One of the two has warmed the models up, the other waited, and both said so.
    assert sorted("warming up" in errors for _, errors in results) == [False, True]
    assert sorted("waiting for it" in errors for _, errors in results) == [False, True]
