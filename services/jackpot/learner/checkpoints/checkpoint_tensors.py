"""The tensors of models and optimizers in a checkpoint, under names that do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jackpot.compute.model_weights import own_tensors
from jackpot.trajectory import Role


@dataclass(frozen=True, slots=True)
class Learnable:
    """A model and its optimizer, saved and restored together."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


def tensors_of(learnables: Mapping[Role, Learnable]) -> dict[str, Tensor]:
    """Weights and moments under names that do not depend on the number of ranks."""
    tensors: dict[str, Tensor] = {}
    for role, learnable in learnables.items():
        parameters, _ = own_tensors(learnable.model)
        tensors |= {f"{role}/weights/{name}": tensor.detach() for name, tensor in parameters.items()}
        for name, parameter in learnable.model.named_parameters():
            for key, value in learnable.optimizer.state.get(parameter, {}).items():
                tensors[f"{role}/optimizer/{name}/{key}"] = torch.as_tensor(value).detach()
    return tensors


def empty_moments(learnables: Mapping[Role, Learnable], stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors into which the moments among ``stored`` are read."""
    tensors: dict[str, Tensor] = {}
    for role, name, key, parameter in _moment_names(learnables):
        stored_name = f"{role}/optimizer/{name}/{key}"
        if stored_name in stored:
            whole = parameter.detach()
            # A step counter is a single number, even if its parameter is sharded.
            tensors[stored_name] = torch.zeros((), device=whole.device) if key == "step" else torch.zeros_like(whole)
    return tensors


def take_up_moments(learnables: Mapping[Role, Learnable], tensors: Mapping[str, Tensor]) -> None:
    """Load the moments that were read into ``tensors`` into the optimizers."""
    for role, name, key, parameter in _moment_names(learnables):
        value = tensors.get(f"{role}/optimizer/{name}/{key}")
        if value is not None:
            learnables[role].optimizer.state[parameter][key] = value


def _moment_names(learnables: Mapping[Role, Learnable]) -> list[tuple[Role, str, str, nn.Parameter]]:
    return [
        (role, name, key, parameter)
        for role, learnable in learnables.items()
        for name, parameter in learnable.model.named_parameters()
        for key in ("step", "exp_avg", "exp_avg_sq")
    ]
