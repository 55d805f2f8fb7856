"""One way for all services to load a model, to get its hidden states and logits, and to swap its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerances import model_rounding
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from jackpot.compute.model_checks import self_check
from jackpot.compute.model_loading import attention_of, load_causal_lm
from jackpot.compute.model_weights import apply_state, load_state, read_state, save_weights
from jackpot.compute.models import hidden_states, output_head, resolve_device, set_threads
from jackpot.errors import ConfigError, WeightCorruptError

MakeModel = Callable[..., Path]
ARCHITECTURES = ["qwen3", "llama"]
SIZES = {
    "vocab_size": 49,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.4,
}


def load(make_model: MakeModel, architecture: str = "qwen3", seed: int = 0) -> PreTrainedModel:
    return load_causal_lm(make_model(architecture, seed), "float32", "cpu")


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 13)[None]).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("with_mask", [True, False])
def test_hidden_states_and_head_give_the_models_logits_in_right_padded_batches(
    make_model: MakeModel, architecture: str, with_mask: bool
) -> None:
    model = load(make_model, architecture)
    rows = [torch.tensor([3, 4, 5, 6, 7, 8]), torch.tensor([9, 10, 11])]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=2)
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3]) if with_mask else None
    with torch.no_grad():
        hidden = hidden_states(model, ids, mask)
        assert hidden.shape == (2, 6, 32)
        for row, row_hidden in zip(rows, hidden, strict=True):
            expected = model(input_ids=row[None]).logits[0]
            found = output_head(model).logits(row_hidden[: len(row)])
            torch.testing.assert_close(found, expected, rtol=0, atol=model_rounding(model.config, 6, expected))


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        (GraniteConfig(**SIZES, logits_scaling=8.0), 0.125, None),
        (CohereConfig(**SIZES, logit_scale=0.25), 0.25, None),
        (Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0), 1.0, 3.0),
    ],
    ids=["granite", "cohere", "gemma2"],
)
def test_scales_and_soft_caps_of_logits_are_known(
    config: PreTrainedConfig, scale: float, softcap: float | None
) -> None:
    model = AutoModelForCausalLM.from_config(config).eval()
    head = output_head(model)
    assert (head.scale, head.softcap) == (scale, softcap)
    self_check(model)


def test_a_model_with_capped_attention_scores_never_has_an_attention_that_ignores_the_cap(tmp_path: Path) -> None:
    """SDPA does, and transformers before 5.20 chooses it for Gemma-2."""
    config = Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=0.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    capped = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    uncapped = AutoModelForCausalLM.from_pretrained(tmp_path, attn_logit_softcapping=None).eval()
    expected = logits_of(capped)
    bound = model_rounding(config, 10, expected)
    assert float((logits_of(load_causal_lm(tmp_path, "float32", "cpu")) - expected).abs().max()) <= bound
    assert float((logits_of(uncapped) - expected).abs().max()) > 100 * bound
    assert attention_of(config) == "eager"  # by our own choice, whatever this transformers would choose
    assert attention_of(Gemma2Config(**SIZES, attn_logit_softcapping=None)) is None


def test_a_model_with_a_number_that_is_none_is_refused_by_its_tensor(make_model: MakeModel, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(make_model(), directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"actor\.model = .* its tensor model\.norm\.weight has NaN or infinite values"
    ):
        load_causal_lm(directory, "float32", "cpu", field="actor.model")


def test_a_model_whose_hidden_states_cannot_be_had_is_refused_and_does_not_crash() -> None:
    class Unreachable(Qwen3ForCausalLM):
        base_model_prefix = "language_model"  # as Llama-4 has it

    model = Unreachable(Qwen3Config(**SIZES, head_dim=8)).eval()
    with pytest.raises(ConfigError, match=r"policy\.model = 'Unreachable': its hidden states cannot be computed apart"):
        self_check(model, field="policy.model")


def test_a_head_that_does_not_reproduce_the_logits_is_refused_by_name(make_model: MakeModel) -> None:
    model = load(make_model)
    model.config.logit_scale = 0.5  # Qwen3 does not apply it
    with pytest.raises(ConfigError, match=r"policy\.model = 'Qwen3ForCausalLM': its logits are not those of"):
        self_check(model, field="policy.model")


def test_loading_gives_an_eval_model_in_the_asked_number_format(make_model: MakeModel) -> None:
    model = load_causal_lm(make_model("llama"), "bfloat16", resolve_device("cpu"))
    assert not model.training
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "is not a directory. Give a model directory in Hugging Face format"),
        (lambda d: (d / "config.json").unlink(), "holds no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "its config.json cannot be read"),
        (lambda d: (d / "config.json").write_text("{}"), "its config.json names no model_type"),
        (lambda d: (d / "model.safetensors").unlink(), "holds no *.safetensors"),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"no tensors"),
            "is cut short or is no safetensors file (10 bytes)",
        ),
    ],
)
def test_a_directory_that_is_not_a_model_is_a_setting_that_cannot_work(
    make_model: MakeModel, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(make_model(), directory)
    spoil(directory)
    with pytest.raises(ConfigError) as caught:
        load_causal_lm(directory, "float32", "cpu", field="actor.model")
    assert str(caught.value).startswith(f"actor.model = '{directory}': ")
    assert message in str(caught.value)
    assert caught.value.remedy


def test_a_model_that_lacks_tensors_is_refused_instead_of_filled_with_noise(
    make_model: MakeModel, tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(make_model(), directory)
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 tensors \(model\.norm\.weight\)"):
        load_causal_lm(directory, "float32", "cpu")


def test_code_in_a_model_directory_is_never_run(make_model: MakeModel, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(make_model(), directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_causal_lm(directory, "float32", "cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_weights_make_another_model_the_same(make_model: MakeModel, tmp_path: Path, architecture: str) -> None:
    model, other = load(make_model, architecture, seed=0), load(make_model, architecture, seed=1)
    assert not torch.equal(logits_of(model), logits_of(other))
    parameters = list(other.parameters())
    save_weights(model, tmp_path)
    load_state(other, tmp_path)
    assert torch.equal(logits_of(model), logits_of(other))
    assert all(a is b for a, b in zip(parameters, other.parameters(), strict=True))  # in place


def test_tied_tensors_are_stored_once_and_stay_tied(make_model: MakeModel, tmp_path: Path) -> None:
    model = load(make_model)
    save_weights(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight" in stored
    assert "lm_head.weight" not in stored
    # A file that names the tied tensor by its other name means the same.
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] * 2
    del stored["model.embed_tokens.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    load_state(model, tmp_path)
    assert model.get_input_embeddings().weight is output_head(model).weight
    assert torch.equal(output_head(model).weight, stored["lm_head.weight"])


def test_weights_are_cast_to_the_models_number_format(make_model: MakeModel, tmp_path: Path) -> None:
    exact = load(make_model, seed=1)
    rounded = load_causal_lm(make_model(seed=0), "bfloat16", "cpu")
    save_weights(exact, tmp_path)
    load_state(rounded, tmp_path)
    assert torch.equal(output_head(rounded).weight, output_head(exact).weight.to(torch.bfloat16))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_cut, "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (_edit(lambda tensors: tensors.pop("model.norm.weight")), r"lacks 1 tensors \(model\.norm\.weight\)"),
        (_edit(lambda tensors: tensors.update(extra=torch.zeros(1))), "tensor 'extra' is not in the model"),
        (
            _edit(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(31)})),
            r"'model.norm.weight' has shape \[31\], the model's has \[32\]",
        ),
    ],
)
def test_weights_that_do_not_fit_leave_the_model_as_it_was(
    make_model: MakeModel, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    model = load(make_model, seed=0)
    before = logits_of(model)
    save_weights(load(make_model, seed=1), tmp_path)
    spoil(tmp_path / "model.safetensors")
    with pytest.raises(WeightCorruptError, match=message):
        load_state(model, tmp_path)
    assert torch.equal(logits_of(model), before)


def test_reading_and_applying_weights_are_separate_steps(make_model: MakeModel, tmp_path: Path) -> None:
    model, other = load(make_model, seed=0), load(make_model, seed=1)
    before = logits_of(model)
    save_weights(other, tmp_path)
    state = read_state(model, tmp_path)
    shutil.rmtree(tmp_path)  # pruned meanwhile: the state is in memory
    assert torch.equal(logits_of(model), before)
    apply_state(model, state)
    assert torch.equal(logits_of(model), logits_of(other))


def test_a_pruned_version_is_told_from_a_damaged_one(make_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_state(load(make_model), tmp_path / "pruned")


def test_devices_are_resolved_or_refused() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match=r"rollout\.device = 'cuda:99': this process sees \d+ CUDA devices"):
        resolve_device("cuda:99", field="rollout.device")


def test_threads_are_set_or_left_alone() -> None:
    before = torch.get_num_threads()
    set_threads(0)
    assert torch.get_num_threads() == before
    set_threads(before + 1)
    try:
        assert torch.get_num_threads() == before + 1
    finally:
        set_threads(before)
