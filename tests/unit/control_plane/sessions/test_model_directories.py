"""Model directories that are whole, and pairs that speak of the same tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from jackpot.config import JobSpec, parse_job
from jackpot.control_plane.sessions.model_directories import check_models, read_vocabulary, report_vocabulary
from jackpot.errors import ConfigError

MakeModel = Callable[..., Path]


@pytest.fixture
def model(tmp_path: Path, make_model: MakeModel) -> Path:
    """A model of one's own to damage."""
    return shutil.copytree(make_model("qwen3", seed=1), tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def job_of(policy: Path, actor: Path | str) -> JobSpec:
    described = actor if isinstance(actor, str) else {"model": str(actor)}
    return parse_job({"policy": {"model": str(policy)}, "actor": described, "task": {"name": "complement"}})


def test_a_whole_pair_passes_also_when_the_actor_is_smaller(make_model: MakeModel) -> None:
    policy = make_model("qwen3", seed=1)
    check_models(job_of(policy, make_model("qwen3", seed=2, hidden_size=16, num_hidden_layers=1)))
    check_models(job_of(policy, "policy"))
    vocabulary = read_vocabulary("policy.model", str(policy))
    assert vocabulary.size == 49 and dict(vocabulary.added) == {0: "<s>", 1: "</s>", 2: "<pad>"}


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda d: shutil.rmtree(d), "is not a directory"),
        (lambda d: (d / "config.json").unlink(), "holds no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (lambda d: edit(d / "config.json", vocab_size=None), "does not state vocab_size"),
        (lambda d: (d / "tokenizer.json").unlink(), "holds no tokenizer.json"),
        (lambda d: edit(d / "tokenizer.json", model=[]), "holds no vocabulary"),
        (lambda d: edit(d / "tokenizer.json", added_tokens=[{"id": "?"}]), "holds no vocabulary"),
        (lambda d: (d / "model.safetensors").unlink(), "holds no *.safetensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_half_a_model_is_refused_by_what_is_missing(model: Path, damage: Callable[[Path], Any], problem: str) -> None:
    damage(model)
    with pytest.raises(ConfigError) as caught:
        check_models(job_of(model, "policy"))
    assert caught.value.field == "policy.model" and problem in caught.value.problem and caught.value.remedy


def test_of_a_model_in_shards_every_shard_must_be_there(model: Path) -> None:
    whole = model / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    save_file({"model.norm.weight": tensors.pop("model.norm.weight")}, model / "model-00001-of-00002.safetensors")
    index = model / "model.safetensors.index.json"
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ConfigError, match=r"lacks model-00002-of-00002\.safetensors"):
        check_models(job_of(model, "policy"))
    save_file(tensors, model / "model-00002-of-00002.safetensors")
    check_models(job_of(model, "policy"))
    index.write_text("{}")
    with pytest.raises(ConfigError, match="has no weight_map"):
        check_models(job_of(model, "policy"))


def test_what_no_service_could_use_is_refused_before_any_starts(model: Path) -> None:
    job = job_of(model, "policy")
    described = (model / "config.json").read_text()
    for changes, problem in (
        ({"model_type": "llama4"}, "llama4 computes no hidden states"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantized \(awq\)"),
    ):
        edit(model / "config.json", **changes)
        with pytest.raises(ConfigError, match=problem):
            check_models(job)
        (model / "config.json").write_text(described)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ConfigError, match=r"policy\.model = .* model\.norm\.weight has NaN"):
        check_models(job)


def test_a_context_beyond_the_models_positions_is_refused(model: Path) -> None:
    limited = {"model": str(model), "context_length": 129}
    job = parse_job({"policy": limited, "actor": "policy", "task": {"name": "complement"}})
    with pytest.raises(
        ConfigError, match=r"policy\.context_length = 129: .* has 128 positions\. Set it to at most 128"
    ):
        check_models(job)


def test_the_vocabulary_of_a_model_with_several_parts_is_that_of_its_text_part(model: Path) -> None:
    edit(model / "config.json", text_config={"vocab_size": 7}, vocab_size=None)
    assert read_vocabulary("policy.model", str(model)).size == 7


def _swap_two_ids(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())["model"]
    tokenizer["vocab"] |= {"a": tokenizer["vocab"]["b"], "b": tokenizer["vocab"]["a"]}
    edit(model / "tokenizer.json", model=tokenizer)


def _rename_added(model: Path) -> None:
    added = json.loads((model / "tokenizer.json").read_text())["added_tokens"]
    edit(model / "tokenizer.json", added_tokens=[added[0], added[1] | {"content": "<end>"}, added[2]])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: edit(d / "config.json", vocab_size=40), "only 40 rows in common, and their tokenizer has 49 tokens"),
        (_swap_two_ids, "its tokens mean nothing to the policy"),
        (_rename_added, "id 1 is '<end>', there '</s>'"),
    ],
    ids=["rows", "ids", "added token"],
)
def test_an_actor_of_another_vocabulary_is_refused(
    model: Path, make_model: MakeModel, change: Callable[[Path], None], problem: str
) -> None:
    change(model)
    with pytest.raises(ConfigError) as caught:
        check_models(job_of(make_model("qwen3", seed=1), model))
    assert caught.value.field == "actor.model" and problem in caught.value.problem


def test_an_actor_that_is_padded_to_other_rows_is_taken_and_both_sizes_are_told(
    model: Path, make_model: MakeModel
) -> None:
    policy = make_model("qwen3", seed=1)
    assert report_vocabulary(job_of(policy, model)) == report_vocabulary(job_of(policy, "policy")) == []
    edit(model / "config.json", vocab_size=152_064)
    job = job_of(policy, model)
    check_models(job)
    (line,) = report_vocabulary(job)
    assert "the policy has rows for 49 token ids and the actor for 152,064; the first 49 are used" in line


def test_an_added_token_that_only_one_of_the_two_names_is_no_difference(model: Path, make_model: MakeModel) -> None:
    added = json.loads((model / "tokenizer.json").read_text())["added_tokens"]
    edit(model / "tokenizer.json", added_tokens=[*added, added[0] | {"id": 48, "content": "<think>"}])
    check_models(job_of(make_model("qwen3", seed=1), model))
