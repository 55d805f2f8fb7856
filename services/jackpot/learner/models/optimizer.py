"""The optimizer, and gradient clipping."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from jackpot.config import LearnerConfig


def build_optimizer(model: nn.Module, lr: float, config: LearnerConfig) -> torch.optim.AdamW:
    """AdamW over a model's parameters; weight decay on matrices only, not on norms and biases.

    Fused: one kernel for all tensors, instead of a dozen operations on each or on temporary copies of all.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=config.betas, fused=True)


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale a model's gradients to a norm of at most ``max_norm``, over all tensors and ranks; the norm before."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)
