"""What is written of a model is what save_pretrained writes, and reading it back gives the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from torch import Tensor

from jackpot.compute.model_loading import read_causal_lm
from jackpot.compute.model_weights import copy_state, load_state, own_tensors, save_weights
from jackpot.errors import WeightCorruptError

MakeModel = Callable[..., Path]
CONVERTED = {"gpt_neox", "qwen3_moe", "mixtral", "olmoe", "granitemoe", "phimoe", "ernie4_5_moe", "deepseek_v3"}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_written_and_read_as_save_pretrained_does(make_model: MakeModel, tmp_path: Path, architecture: str) -> None:
    model = read_causal_lm(make_model(architecture, seed=1), "float32")
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    save_weights(model, tmp_path / "ours")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert_equal(load_file(tmp_path / "ours" / "model.safetensors"), theirs)
    assert_equal(copy_state(model), theirs)
    own, _ = own_tensors(model)
    assert (own.keys() != theirs.keys()) == (architecture in CONVERTED)

    other = read_causal_lm(make_model(architecture, seed=2), "float32")
    load_state(other, tmp_path / "ours")
    assert_equal(own_tensors(other)[0], own)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_neox"])
def test_a_directory_with_transformers_own_names_is_written_with_the_hubs(
    make_model: MakeModel, tmp_path: Path, architecture: str
) -> None:
    model = read_causal_lm(make_model(architecture), "float32")
    own, _ = own_tensors(model)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert load_file(tmp_path / "model.safetensors").keys() == own.keys()
    again = read_causal_lm(tmp_path, "float32")
    assert_equal(copy_state(again), load_file(make_model(architecture) / "model.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"), r"lacks 1 tensors \(.*experts\.3\.up_proj"),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.3.up_proj.weight": torch.zeros(47, 32)}),
            r"experts\.3\.up_proj\.weight' has shape \[47, 32\], the model's has \[48, 32\]",
        ),
        (lambda t: t.update({"model.layers.1.mlp.experts.4.up_proj.weight": torch.zeros(48, 32)}), "is not in the mod"),
        (lambda t: t.update({"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(4, 96, 32)}), "is not in the mod"),
    ],
    ids=["missing", "shape", "too-many", "own-name"],
)
def test_experts_that_do_not_fit_are_refused_by_the_hubs_name(
    make_model: MakeModel, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    model = read_causal_lm(make_model("qwen3_moe"), "float32")
    before = copy_state(model)
    tensors = load_file(make_model("qwen3_moe", seed=1) / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightCorruptError, match=message):
        load_state(model, tmp_path)
    assert_equal(copy_state(model), before)
