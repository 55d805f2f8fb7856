"""Mixtures of experts on vLLM's CPU build: new weights are packed as the first ones were.

The CPU kernel multiplies with packed experts, padded to a size that it knows. vLLM packs them when it loads the model
and leaves that out when weights change, so that the kernel would read plain rows as packed ones: noise, without an
error.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod


def pack_experts_at_each_update() -> None:
    """Have vLLM pack experts whenever it has loaded them, and not only the first time. Idempotent."""
    original = UnquantizedFusedMoEMethod.process_weights_after_loading
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def process(self: Any, layer: Any) -> None:
        update = self.moe_kernel is not None
        original(self, layer)
        if update:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod.process_weights_after_loading = process
