"""Models that rank 0 reads tensor by tensor: what every rank holds of them then, and what it computes."""

from __future__ import annotations

import json
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loading_ranks import load_on
from patience import TEST_SECONDS
from safetensors.torch import load_file, save_file
from tolerances import model_rounding
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, Glm4MoeConfig, Phi3Config, PreTrainedModel

from jackpot.compute.forward import completion_hidden
from jackpot.compute.model_loading import load_causal_lm
from jackpot.compute.model_weights import own_tensors
from jackpot.compute.models import output_head
from jackpot.compute.ranks import loading
from jackpot.compute.ranks.group import Ranks
from jackpot.compute.ranks.loading import load_on_ranks
from jackpot.compute.ranks.sharding import HELD, rows_of
from jackpot.errors import ConfigError

pytestmark = pytest.mark.timeout(TEST_SECONDS)

SIZE = 2  # of which the 49 token ids are no multiple
MakeModel = Callable[..., Path]
Tensors = dict[str, Tensor]


@pytest.fixture
def remade(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Copies of a model's directory, whose tensors were changed in place."""
    numbers = iter(range(100))

    def remake(directory: Path, change: Callable[[Tensors], object]) -> Path:
        copied = tmp_path / f"remade-{next(numbers)}"
        shutil.copytree(directory, copied)
        tensors = load_file(copied / "model.safetensors")
        change(tensors)
        save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
        return copied

    yield remake


def in_bfloat16(tensors: Tensors) -> None:
    tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items()}


def with_head(factor: float) -> Callable[[Tensors], None]:
    """Tied embeddings that the file holds twice."""

    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor

    return add


def without_prefix(tensors: Tensors) -> None:
    """As a trunk saved without its output layer names them."""
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def in_several_files(directory: Path, target: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(target, max_shard_size="20KB")
    assert (target / "model.safetensors.index.json").exists() and len(list(target.glob("*.safetensors"))) > 2
    return target


def mixture_of_experts(target: Path) -> Path:
    """Its file has a tensor for each expert and the model one for all of them, and a buffer for each router."""
    config = Glm4MoeConfig(
        vocab_size=49,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=5,
        num_experts_per_tok=2,
        initializer_range=0.4,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = AutoModelForCausalLM.from_config(config)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_()
    model.save_pretrained(target)
    stored = load_file(target / "model.safetensors").keys()
    assert {"model.layers.1.mlp.experts.4.up_proj.weight", "model.layers.1.mlp.gate.e_score_correction_bias"} <= stored
    return target


def scaled_embeddings(target: Path) -> Path:
    """In bfloat16, with a buffer that no file holds: √40, which bfloat16 rounds."""
    config = Gemma3TextConfig(
        vocab_size=49,
        hidden_size=40,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.4,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(target)
    return target


def long_factors(target: Path) -> Path:
    """Its rotary frequencies depend on the job's longest sequence, already at the first positions."""
    config = Phi3Config(
        vocab_size=49,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        pad_token_id=2,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4},
    )
    with torch.random.fork_rng():
        torch.manual_seed(6)
        AutoModelForCausalLM.from_config(config).save_pretrained(target)
    return target


def test_every_rank_holds_its_rows_of_what_one_process_loads(
    tmp_path: Path, make_model: MakeModel, remade: Callable[..., Path]
) -> None:
    qwen, llama = make_model("qwen3", seed=1), make_model("llama", seed=2)
    models = [
        (qwen, "float32"),  # tied embeddings
        (llama, "float32"),  # untied
        (llama, "bfloat16"),
        (remade(llama, in_bfloat16), "float32"),
        (in_several_files(llama, tmp_path / "several"), "float32"),
        (remade(qwen, with_head(1.0)), "float32"),
        (remade(qwen, with_head(2.0)), "float32"),  # what the configuration ties is not the same
        (remade(qwen, without_prefix), "float32"),
        (mixture_of_experts(tmp_path / "experts"), "float32"),
        (scaled_embeddings(tmp_path / "scaled"), "float32"),
    ]
    longest = {len(models): 100}  # by index
    models.append((long_factors(tmp_path / "long"), "float32"))
    reports = load_on(tmp_path, [(*model, longest.get(index)) for index, model in enumerate(models)], SIZE)
    for index, (path, dtype) in enumerate(models):
        whole = load_causal_lm(path, dtype, "cpu", context_length=longest.get(index))
        for rank in range(SIZE):
            check_rank(whole, reports[rank][index], load_file(tmp_path / f"{index}-{rank}.safetensors"), rank)
    for index in (0, 1, 8):  # one file, with the hub's names
        stored = load_file(models[index][0] / "model.safetensors")
        for rank in range(SIZE):
            layout = reports[rank][index]["layout"]
            assert layout == {name: list(tensor.shape) for name, tensor in stored.items()}
            assert reports[rank][index]["read_back"]


def check_rank(whole: PreTrainedModel, report: dict[str, Any], held: Tensors, rank: int) -> None:
    own, aliases = own_tensors(whole)
    assert all(report["meta"])
    assert report["aliases"] == aliases
    assert held.keys() == own.keys()
    for name, tensor in own.items():
        sharded = isinstance(tensor, torch.nn.Parameter)
        assert held[name].dtype == tensor.dtype
        assert torch.equal(held[name], tensor[rows_of(len(tensor), SIZE, rank)] if sharded else tensor), name
    with torch.no_grad():
        expected = output_head(whole).logits(completion_hidden(whole, [[5, 6, 7, 8]], [1])).float()
    # bfloat16 rounds every layer's states to 2⁻⁸, some ten times in two layers.
    exact = whole.dtype == torch.float32
    atol = model_rounding(whole.config, 4, expected) if exact else 0.05 * float(expected.abs().max())
    torch.testing.assert_close(torch.tensor(report["logits"]), expected, rtol=0, atol=atol)


def test_what_cannot_be_loaded_is_refused_by_all_ranks_in_the_words_of_one_process(
    tmp_path: Path, make_model: MakeModel, remade: Callable[..., Path]
) -> None:
    torn, scaled, incomplete = tmp_path / "torn", tmp_path / "scaled", tmp_path / "incomplete"
    torn.mkdir()
    shutil.copy(make_model("qwen3", seed=1) / "config.json", torn)
    (torn / "model.safetensors").write_bytes((make_model("qwen3", seed=1) / "model.safetensors").read_bytes()[:-50])
    shutil.copytree(make_model("qwen3", seed=1), scaled)
    config = json.loads((scaled / "config.json").read_text())
    (scaled / "config.json").write_text(json.dumps(config | {"logit_scale": 0.5}))  # Qwen3 does not apply it
    in_several_files(make_model("llama", seed=2), incomplete)
    sorted(incomplete.glob("model-*.safetensors"))[-1].unlink()
    refused = {
        torn: "where its header states",
        remade(make_model("llama", seed=2), lambda tensors: tensors.pop("model.norm.weight")): "lacks 1 tensors",
        remade(make_model("llama", seed=2), narrowed): "cannot be loaded",
        incomplete: "lacks model-",
        remade(make_model("llama", seed=2), with_nan): r"lm_head\.weight has NaN",
        scaled: "its logits are not those of its last hidden states",
    }
    reports = load_on(tmp_path, [(path, "float32", None) for path in refused], SIZE)
    for index, (path, message) in enumerate(refused.items()):
        with pytest.raises(ConfigError, match=message) as caught:
            load_causal_lm(path, "float32", "cpu", field="policy.model")
        assert [report[index] for report in reports] == [{"refused": str(caught.value)}] * SIZE


def with_nan(tensors: Tensors) -> None:
    tensors["lm_head.weight"][-1, -1] = float("nan")


def narrowed(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


class Unheard(Ranks):
    """Rank 0 of two, whose other one takes its time, and notes how many of the tensors it has read are still there."""

    def __init__(self, read: weakref.WeakSet[Any]) -> None:
        super().__init__(rank=0, size=2)
        object.__setattr__(self, "read", read)
        object.__setattr__(self, "most", 0)

    def broadcast(self, payload: bytes = b"") -> bytes:
        return payload

    def send(self, tensor: Tensor, rank: int) -> None:
        time.sleep(0.01)  # for whoever would read ahead
        object.__setattr__(self, "most", max(self.most, len(self.read)))


def test_rank_0_has_one_tensor_at_a_time(
    make_model: MakeModel, remade: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file in bfloat16, which makes for a copy in float32 of all that is read."""
    path = remade(make_model("llama", seed=2, num_hidden_layers=4), in_bfloat16)
    converted: weakref.WeakSet[Any] = weakref.WeakSet()
    convert = Tensor.to

    def noting(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = convert(tensor, *args, **kwargs)
        if made.dtype == torch.float32 and not made.is_meta and tensor.dtype == torch.bfloat16:
            converted.add(made)
        return made

    monkeypatch.setattr(Tensor, "to", noting)
    ranks = Unheard(converted)
    load_on_ranks(str(path), "float32", ranks, torch.device("cpu"), field="policy.model")
    assert ranks.most == 1


def test_with_a_transformers_that_marks_nothing_rank_0_hands_out_the_whole_and_says_so(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, cpu = str(make_model("qwen3", seed=1)), torch.device("cpu")
    held = getattr(load_on_ranks(path, "float32", Unheard(weakref.WeakSet()), cpu, field="policy.model"), HELD)
    assert "held" not in caplog.text
    monkeypatch.setattr(loading, "_READ_MARK", "not there")
    model = load_on_ranks(path, "float32", Unheard(weakref.WeakSet()), cpu, field="policy.model")
    assert f"rank 0 held {len(held)} tensors whole" in caplog.text
    assert all(parameter.is_meta for parameter in model.parameters())
    assert getattr(model, HELD).keys() == held.keys()
    assert all(torch.equal(getattr(model, HELD)[name], rows) for name, rows in held.items())
