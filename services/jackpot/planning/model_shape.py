"""A model's size, from its config.json alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jackpot.errors import ConfigError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only transformer with gated feed-forward layers and grouped attention."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int  # of one expert, if the model has experts
    vocabulary: int
    tied: bool  # input and output embeddings are one matrix
    experts: int = 1
    active_experts: int = 1

    @property
    def embedding(self) -> int:
        """Parameters of one embedding, V · H."""
        return self.vocabulary * self.hidden

    @property
    def attention(self) -> int:
        """Parameters of one layer's attention: queries, keys, values, output."""
        return 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)

    @property
    def expert(self) -> int:
        """Parameters of one feed-forward block: gate, up, down."""
        return 3 * self.hidden * self.intermediate

    @property
    def block(self) -> int:
        """Parameters of one layer, with all of its experts."""
        router = self.hidden * self.experts if self.experts > 1 else 0
        return self.attention + self.experts * self.expert + router

    @property
    def parameters(self) -> int:
        """N, all parameters without norms and biases, which are about a thousandth."""
        return self.layers * self.block + self.embedding * (1 if self.tied else 2)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses; the N of the 2N and 6N rules."""
        return self.parameters - self.layers * (self.experts - self.active_experts) * self.expert

    def attention_flops(self, context: float) -> float:
        """Forward FLOPs of one token's attention to ``context`` tokens: scores and mixing, 4 · context · width."""
        return 4.0 * context * self.heads * self.head_size * self.layers

    def kv_bytes(self, dtype_bytes: int) -> int:
        """Numbers in the attention cache of one token."""
        return 2 * self.layers * self.kv_heads * self.head_size * dtype_bytes

    def activation_elements(self) -> int:
        """Activations that training keeps of one token over all layers, in numbers of the compute dtype. Counted with
        autograd's hooks on transformers' Qwen3, whose norms keep their float32 input. (Llama has no norms of queries
        and keys, and keeps two times these instead of five.)"""
        attention = 5 * (self.heads + self.kv_heads) * self.head_size
        return self.layers * (8 * self.hidden + attention + 4 * self.active_experts * self.intermediate)


def _qwen3(
    hidden: int, layers: int, heads: int, intermediate: int, *, tied: bool, experts: int = 1, active: int = 1
) -> ModelShape:
    kv_heads = 4 if experts > 1 else 8
    return ModelShape(hidden, layers, heads, kv_heads, 128, intermediate, 151_936, tied, experts, active)


KNOWN = {
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12_288, tied=False),
    "qwen3-14b": _qwen3(5120, 40, 40, 17_408, tied=False),
    "qwen3-32b": _qwen3(5120, 64, 64, 25_600, tied=False),
    "qwen3-30b-a3b": _qwen3(2048, 48, 32, 768, tied=False, experts=128, active=8),
}
"""Models that can be planned without their files, by name."""


def read_shape(field: str, model: str) -> ModelShape:
    """The shape of a model: a directory with a config.json, such a file, or a name of :data:`KNOWN`.

    A name may come as a path, since job files turn model names into paths.

    Raises:
        ConfigError: there is none, or it lacks a size.
    """
    path = Path(model)
    if not path.exists() and path.name.lower() in KNOWN:
        return KNOWN[path.name.lower()]
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        names = ", ".join(KNOWN)
        remedy = f"Give a model directory or its config.json, or one of {names}."
        raise ConfigError(field, model, f"has no config.json that can be read ({error})", remedy) from None
    text = config.get("text_config") if isinstance(config, dict) else None
    return _shape(field, model, text if isinstance(text, dict) else config)


def _shape(field: str, model: str, config: Any) -> ModelShape:
    def size(*names: str, default: int | None = None) -> int:
        for name in names:
            value = config.get(name)
            if isinstance(value, int) and value > 0:
                return value
        if default is not None:
            return default
        raise ConfigError(
            field, model, f"its config.json has no {names[0]}", "Name a decoder-only model of transformers."
        )

    if not isinstance(config, dict):
        raise ConfigError(field, model, "its config.json is not a JSON object", "Download the model again.")
    hidden, heads = size("hidden_size", "n_embd"), size("num_attention_heads", "n_head")
    experts = size("num_experts", "num_local_experts", "n_routed_experts", default=1)
    intermediate = size("intermediate_size", "n_inner", default=4 * hidden)
    return ModelShape(
        hidden=hidden,
        layers=size("num_hidden_layers", "n_layer"),
        heads=heads,
        kv_heads=size("num_key_value_heads", default=heads),
        head_size=size("head_dim", default=hidden // heads),
        intermediate=size("moe_intermediate_size", default=intermediate) if experts > 1 else intermediate,
        vocabulary=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        experts=experts,
        active_experts=size("num_experts_per_tok", default=1) if experts > 1 else 1,
    )
