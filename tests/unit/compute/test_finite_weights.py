"""Weight versions with numbers that are none are neither written nor read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jackpot.compute.model_loading import load_causal_lm
from jackpot.compute.model_weights import is_finite, read_state, save_weights
from jackpot.errors import WeightCorruptError

MakeModel = Callable[..., Path]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_such_number_keeps_a_version_from_being_published_and_from_being_read(
    make_model: MakeModel, tmp_path: Path, value: float
) -> None:
    model = load_causal_lm(make_model("llama"), "float32", "cpu")
    save_weights(model, tmp_path)
    read_state(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        WeightCorruptError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' has NaN or infinite values"
    ):
        read_state(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, -1] = value
    with pytest.raises(WeightCorruptError, match=r"up_proj\.weight' has NaN or infinite values and is not written"):
        save_weights(model, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_greatest_numbers_of_a_format_are_numbers(dtype: torch.dtype) -> None:
    extremes = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
    assert is_finite(extremes)
    assert not is_finite(torch.cat([extremes, torch.tensor([float("nan")], dtype=dtype)]))
    assert is_finite(torch.empty(0, dtype=dtype)) and is_finite(torch.tensor([1, 2]))
