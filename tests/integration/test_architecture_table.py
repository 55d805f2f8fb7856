"""A dozen rows of the table in docs/models.md, made again: `benchmarks/architecture_table.py` makes all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from architecture_table import BOUND, CELLS, measure

ROWS = (
    *("deepseek_v3", "falcon", "gemma2", "glm4", "gpt2", "gpt_neox"),
    *("llama", "mixtral", "olmo2", "phi3", "qwen3", "qwen3_moe"),
)
WITH_VLLM = tuple(name for name in CELLS if name.startswith("vLLM"))  # tests/with_vllm has these


@pytest.mark.parametrize("model_type", ROWS)
def test_every_service_agrees_with_plain_transformers(model_type: str, tmp_path: Path) -> None:
    cells = measure(model_type, tmp_path, None)
    assert set(cells) == set(CELLS) - set(WITH_VLLM)
    assert {name: value for name, value in cells.items() if not value < BOUND} == {}


@pytest.mark.parametrize(
    ("model_type", "reason"), [("bert", "does not attend causally"), ("mamba", "cannot be decoded with a cache")]
)
def test_what_no_service_can_do_is_a_refusal(model_type: str, reason: str, tmp_path: Path) -> None:
    cells = measure(model_type, tmp_path, None)
    assert set(cells) == {"engine"}
    assert reason in cells["engine"]
