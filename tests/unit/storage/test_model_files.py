"""Files of a model directory that are damaged, missing, quantized or hold no numbers: each is named before a load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jackpot.errors import ConfigError
from jackpot.storage.model_files import check_numbers, check_weight_files, read_json, refuse_quantized

MakeModel = Callable[..., Path]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 988097824\n"
WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path, make_model: MakeModel) -> Path:
    """A model of one's own to damage."""
    return shutil.copytree(make_model("qwen3", seed=1), tmp_path / "model")


def cut(directory: Path) -> None:
    path = directory / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(directory: Path) -> None:
    with (directory / WEIGHTS).open("ab") as file:
        file.write(b"\0")


def without_header(directory: Path) -> None:
    path = directory / WEIGHTS
    content = bytearray(path.read_bytes())
    content[8] = 0
    path.write_bytes(bytes(content))


def only_a_pickle(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")


def another_name(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "consolidated.safetensors")


def lacking_a_shard(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def with_a_cut_shard(directory: Path) -> None:
    lacking_a_shard(directory)
    (directory / "model-00002-of-00002.safetensors").write_bytes(b"\0" * 7)


def in_gptq(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(2, 2, dtype=torch.int32)
    save_file(tensors, directory / WEIGHTS)


def in_fp8(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, directory / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cut, "where its header states"),
        (lengthen, "where its header states"),
        (without_header, "its model.safetensors has no readable header"),
        (lambda d: (d / WEIGHTS).write_bytes(b""), "is cut short or is no safetensors file (0 bytes)"),
        (lambda d: (d / WEIGHTS).write_bytes(POINTER), "its model.safetensors is a Git LFS pointer"),
        (lambda d: (d / WEIGHTS).unlink(), "holds no *.safetensors"),
        (only_a_pickle, "only pytorch_model.bin, a pickle, which can run code"),
        (another_name, "no model.safetensors.index.json, only consolidated.safetensors"),
        (lacking_a_shard, "lacks model-00002-of-00002.safetensors"),
        (with_a_cut_shard, "its model-00002-of-00002.safetensors is cut short"),
        (in_gptq, "quantized (model.safetensors has model.layers.0.mlp.up_proj.qweight in I32)"),
        (in_fp8, "quantized (model.safetensors has model.norm.weight in F8_E4M3)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.__name__,
)
def test_weights_that_cannot_be_loaded_are_named(model: Path, damage: Callable[[Path], object], problem: str) -> None:
    check_weight_files("policy.model", model)
    damage(model)
    with pytest.raises(ConfigError) as caught:
        check_weight_files("policy.model", model)
    assert (caught.value.field, caught.value.value) == ("policy.model", str(model))
    assert problem in caught.value.problem and caught.value.remedy


def test_a_pointer_in_place_of_a_tokenizer_is_named_with_its_remedy(model: Path) -> None:
    (model / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(ConfigError, match=r"its tokenizer\.json is a Git LFS pointer.* Run `git lfs pull` in it"):
        read_json("policy.model", model / "tokenizer.json")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "bitsandbytes"])
def test_quantized_weights_are_refused_by_their_method(method: str) -> None:
    with pytest.raises(ConfigError, match=rf"actor\.model = 'm': its weights are quantized \({method}\)"):
        refuse_quantized("actor.model", "m", {"quantization_config": {"quant_method": method}})
    refuse_quantized("actor.model", "m", {"quantization_config": None})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_none_is_found_in_every_format(model: Path, dtype: torch.dtype, value: float) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(model / WEIGHTS).items()}
    tensors["model.norm.weight"][0] = torch.finfo(dtype).max
    save_file(tensors, model / WEIGHTS)
    check_numbers("policy.model", model)
    tensors["model.embed_tokens.weight"][-1, -1] = value
    save_file(tensors, model / WEIGHTS)
    with pytest.raises(ConfigError, match=r"its tensor model\.embed_tokens\.weight has NaN or infinite values"):
        check_numbers("policy.model", model)
