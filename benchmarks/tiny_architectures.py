"""A tiny random model of every text-only causal architecture that the installed transformers knows.

A type's own default configuration is made small field by field; the few that need more have it in ``_OWN``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 64
EOS = 1
MAX_PARAMETERS = 20_000_000

_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "embedding_size", "word_embed_proj_dim"), 64
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "shared_intermediate_size"), 96
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": EOS,
}

_OWN: dict[str, dict[str, Any]] = {
    "dots1": {"n_shared_experts": 1},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"head_dim": 16, "num_heads": 8, "expand": 2, "n_groups": 1, "state_size": 16},
    # transformers sets the padding row to 0 whenever it reads one; with tied embeddings that changes the model.
    "youtu": {"pad_token_id": None},
}
_PLAIN_WITH_SUB_CONFIGS = frozenset({"dbrx", "mpt"})  # settings of their attention, no other model
_WITHOUT: dict[str, frozenset[str]] = {"falcon": frozenset({"head_dim"}), "xlstm": frozenset({"v_head_dim"})}


def model_types() -> list[str]:
    """transformers' names of all types with a causal language model, in its order."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def left_out(model_type: str) -> str | None:
    """Why a type is not tried; None if it is."""
    config_class = CONFIG_MAPPING[model_type]
    if getattr(config_class, "sub_configs", None) and model_type not in _PLAIN_WITH_SUB_CONFIGS:
        return "wraps a text model that has a type of its own"
    try:
        config = tiny_config(model_type)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a configuration class thinks of small sizes
        return f"has no small configuration ({' '.join(str(error).split())[:90]})"
    if getattr(config, "is_encoder_decoder", False):
        return "is the decoder of an encoder-decoder model"
    if sum(parameter.numel() for parameter in model.parameters()) > MAX_PARAMETERS:
        return "cannot be made small by its common fields"
    return None


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A small configuration of a type.

    Raises:
        Exception: what the configuration's class raises where it cannot be small.
    """
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    known, without = default.to_dict(), _WITHOUT.get(model_type, frozenset())
    sizes = {name: value for name, value in _SIZES.items() if name not in without}
    sizes = {name: value for name, value in sizes.items() if name in known or hasattr(default, name)}
    if "qk_rope_head_dim" in sizes:  # latent attention: its heads are the rotary part, as many for keys as for queries
        sizes |= {"head_dim": sizes["qk_rope_head_dim"], "num_key_value_heads": sizes["num_attention_heads"]}
    return config_class(**(sizes | _OWN.get(model_type, {})))


def write_model(config: PreTrainedConfig, directory: Path, seed: int = 0) -> Path:
    """Save a random model whose next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # matrices of initial size 0.02 make every model predict the same
                parameter.normal_(0.0, 1.2 / parameter.shape[-1] ** 0.5)
            elif parameter.std() == 0:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


def read_config(directory: Path) -> PreTrainedConfig:
    """The configuration that :func:`write_model` left."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(directory)
    return config
