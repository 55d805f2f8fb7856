"""A model that rank 0 alone loads: what every rank holds of it then, and what it computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from loading_ranks import load_on
from safetensors.torch import load_file

from jackpot.runtime.forward import completion_hidden
from jackpot.runtime.model_weights import own_tensors
from jackpot.runtime.models import load_causal_lm, output_head
from jackpot.runtime.ranks.sharding import rows_of

SIZE = 2  # of which the 49 token ids are no multiple


def test_every_rank_gets_its_slices_of_what_rank_0_loaded(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    """Tied and untied embeddings, both number formats, and a directory that only rank 0 could tell is damaged."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((make_model("qwen3", seed=1) / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes(b"torn")
    models = [
        (make_model("qwen3", seed=1), "float32"),
        (broken, "float32"),
        (make_model("llama", seed=2), "float32"),
        (make_model("llama", seed=2), "bfloat16"),
    ]
    reports = load_on(tmp_path, models, SIZE)
    for index, (path, dtype) in enumerate(models):
        seen = [report[index] for report in reports]
        if path == broken:
            assert all(one["refused"].startswith(f"policy.model = '{broken}': cannot be loaded") for one in seen)
            continue
        whole = load_causal_lm(path, dtype, "cpu")
        assert [any(one["meta"]) for one in seen] == [False, True]
        assert all(seen[1]["meta"])
        assert {one["tied"] for one in seen} == {whole.config.tie_word_embeddings}
        with torch.no_grad():
            expected = output_head(whole).logits(completion_hidden(whole, [[5, 6, 7, 8]], [1])).float()
        for rank in range(SIZE):
            held = load_file(tmp_path / f"{index}-{rank}.safetensors")
            own, _ = own_tensors(whole)
            assert held.keys() == own.keys()
            for name, tensor in own.items():
                assert held[name].dtype == tensor.dtype
                assert torch.equal(held[name], tensor[rows_of(len(tensor), SIZE, rank)]), name
            torch.testing.assert_close(torch.tensor(seen[rank]["logits"]), expected, rtol=0, atol=1e-5)
