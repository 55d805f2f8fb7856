"""Optimizers."""

from __future__ import annotations

import torch
from torch import nn

from jackpot.config import LearnerConfig


def build_optimizer(model: nn.Module, lr: float, config: LearnerConfig) -> torch.optim.AdamW:
    """AdamW over a model's parameters; weight decay on matrices only, not on norms and biases."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=config.betas)
