"""Which models a job can use: refused here, from the files alone and before anything starts, is what the passes of
engine, scorer and learner would not compute as plain transformers does. No torch.

What remains is tried as it is loaded, whatever its name: :func:`jackpot.compute.model_checks.self_check`,
:func:`jackpot.rollout.transformers.decode_check.check_decoding`. docs/models.md has the list.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jackpot.errors import ConfigError
from jackpot.storage.model_configuration import refuse_changing_frequencies_on_vllm, text_part
from jackpot.storage.model_files import COMPLETE, check_weight_files, read_json, refuse_quantized

Engine = Literal["auto", "transformers", "vllm"]

_OTHER = "Use a decoder-only model with attention in every layer, such as Qwen3 or Llama."

# Values of model_type, whose hidden states no pass of ours computes, on any engine.
_BOTH_SIDES = """bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
    roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod cpmant reformer"""
_HALVES = """bart bigbird_pegasus blenderbot blenderbot-small git led longt5 marian mbart mt5 musicgen musicgen_melody
    mvp pegasus plbart prophetnet t5 t5gemma t5gemma2 trocr umt5 whisper"""
_NOT_SERVED: Mapping[str, str] = {
    **dict.fromkeys(_BOTH_SIDES.split(), "does not attend causally"),
    **dict.fromkeys(_HALVES.split(), "is an encoder and a decoder"),
    "llama4": "computes no hidden states apart from its logits",
    "llama4_text": "computes no hidden states apart from its logits",
    "modernbert-decoder": "has an output layer with a transformation of its own",
    "deepseek_v4": "compresses keys and values by the length of a pass",
    "hy_v4": "chooses by an index which tokens it attends to, and passes choose differently",
    "hrm_text": "attends to a prompt from both sides",
    "openai-gpt": "has no cache of keys and values",
    "blt": "reads bytes in patches",
}
# Values of model_type with other layers than attention, always. Where layer_types names them, it decides.
_WITH_A_STATE = """bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid inkling2_loop_text inkling2_text
    inkling_text jamba kimi_linear lara_mini lfm2 lfm2_moe lfm3 mamba mamba2 minimax nemotron_h olmo_hybrid
    qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma rwkv xlstm
    zamba zamba2 zaya"""
_STATEFUL = frozenset(_WITH_A_STATE.split())
_CACHED_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})


def check_model_directory(field: str, model: str, engine: Engine | None) -> dict[str, Any]:
    """Check that a directory holds a whole model that can be served; returns its config.json.

    Args:
        field: the setting that names it, for the message.
        model: the directory, in Hugging Face format.
        engine: what samples from it, as ``rollout.engine`` says; None if nothing does.

    Raises:
        ConfigError: naming field, value and remedy.
    """
    directory = Path(model)
    if not directory.is_dir():
        raise ConfigError(field, model, "is not a directory", "Give a model directory in Hugging Face format.")
    config = read_json(field, directory / "config.json")
    if not config.get("model_type"):
        raise ConfigError(field, model, "its config.json names no model_type", COMPLETE)
    refuse_quantized(field, model, config)
    _refuse_unserved(field, model, config)
    if engine in ("auto", "transformers"):
        _refuse_stateful(field, model, config)
    elif engine == "vllm":
        refuse_changing_frequencies_on_vllm(field, model, config)
    check_weight_files(field, directory)
    return config


def _refuse_unserved(field: str, model: str, config: Mapping[str, Any]) -> None:
    text = text_part(config)
    for part in (config, text):
        if reason := _NOT_SERVED.get(str(part.get("model_type"))):
            raise ConfigError(field, model, f"{part['model_type']} {reason}", _OTHER)
        if part.get("is_encoder_decoder"):
            raise ConfigError(field, model, f"{part['model_type']} is an encoder and a decoder", _OTHER)
    if text.get("index_topk"):
        problem = f"{text['model_type']} chooses by an index which tokens it attends to, and passes choose differently"
        raise ConfigError(field, model, problem, _OTHER)


def _refuse_stateful(field: str, model: str, config: Mapping[str, Any]) -> None:
    text = text_part(config)
    kind = str(text.get("model_type", config["model_type"]))
    layers = text.get("layer_types")
    others = sorted(set(layers) - _CACHED_LAYERS) if isinstance(layers, list) else []
    if kind in _STATEFUL or others:
        what = f"layers of kind {others[0]}" if others else "layers that keep a state"
        problem = f"{kind} has {what}, and the transformers engine caches keys and values only"
        raise ConfigError(field, model, problem, f"Set rollout.engine to vllm. {_OTHER}")
