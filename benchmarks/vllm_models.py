"""Random Qwen3 models for the vLLM benchmarks, made once per directory."""

from __future__ import annotations

from pathlib import Path

SHAPES = {
    # name: hidden, intermediate, layers, heads, key-value heads, head size, vocabulary
    "1m": (128, 384, 4, 4, 2, 32, 2048),
    "0.5b": (896, 4864, 24, 14, 2, 64, 151936),
}


def random_model(directory: Path, shape: str, dtype: str = "float32") -> Path:
    """A directory in Hugging Face format; an existing one is taken as it is."""
    path = directory / f"qwen3-{shape}-{dtype}"
    if (path / "model.safetensors").exists():
        return path
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary = SHAPES[shape]
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(path)
    return path
