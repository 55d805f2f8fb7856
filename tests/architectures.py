"""Tiny random models of many architectures, all over one vocabulary: what a conformance test runs over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Large enough that next-token distributions are far from uniform and differ between seeds.
    "initializer_range": 0.4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

# By transformers' model type, what differs from SIZES; None leaves a setting out.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "mistral": {"tie_word_embeddings": False},
    "phi3": {"tie_word_embeddings": False},
    "granite": {"logits_scaling": 2.0, "embedding_multiplier": 3.0, "tie_word_embeddings": True},
    "gpt2": {"num_key_value_heads": None, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "glm": {"head_dim": 8},
    "olmo2": {},
    "smollm3": {},
    # It has as many heads of keys as of queries; vLLM would believe the setting.
    "gpt_neox": {"num_key_value_heads": None, "tie_word_embeddings": False},
    # Experts of a size that vLLM's CPU kernel has to pad.
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 48},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


def write_random_model(directory: Path, architecture: str, seed: int, **settings: Any) -> None:
    """Write a model directory, without a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    merged = {**SIZES, **ARCHITECTURES[architecture], **settings}
    merged = {name: value for name, value in merged.items() if value is not None}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **merged)).save_pretrained(directory)
