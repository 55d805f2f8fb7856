"""A model for several ranks: rank 0 loads it, the others make it without weights.

What the others make takes no memory until :func:`jackpot.runtime.ranks.sharding.shard` gives each rank its slices. So a
machine holds the model once, and the slices, rather than once for each of its ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from jackpot.errors import ConfigError, JackpotError
from jackpot.runtime.model_weights import own_tensors, put_tensor, tie
from jackpot.runtime.models import load_causal_lm, quiet
from jackpot.runtime.ranks.group import Ranks


def load_on_ranks(model_dir: str, dtype: str, ranks: Ranks, *, field: str) -> PreTrainedModel:
    """A model that is to be sharded, in eval mode; a collective.

    Args:
        model_dir: a directory with config.json and, for rank 0, \\*.safetensors.
        dtype: number format of the weights.
        ranks: all of them.
        field: the setting that named the directory, for error messages.

    Returns:
        On rank 0 the model on the CPU, checked. On the others the same without weights: parameters on the meta device.

    Raises:
        ConfigError: as :func:`load_causal_lm`, on all ranks.
        RankLostError: a rank is gone, or rank 0 took longer than ``collective_timeout_seconds`` to read the model.
    """
    if ranks.rank == 0:
        try:
            model = load_causal_lm(model_dir, dtype, "cpu", field=field)
        except ConfigError as error:
            refused = {"refused": [error.field, str(error.value), error.problem, error.remedy]}
            ranks.broadcast(json.dumps(refused).encode())
            raise
        ranks.broadcast(json.dumps(_layout(model)).encode())
        return model
    told = json.loads(ranks.broadcast())
    if "refused" in told:
        raise ConfigError(*told["refused"])
    return _without_weights(Path(model_dir), told)


def _layout(model: PreTrainedModel) -> dict[str, Any]:
    own, aliases = own_tensors(model)
    return {
        "attention": model.config._attn_implementation,
        "aliases": aliases,
        "tensors": {name: [list(tensor.shape), _name(tensor.dtype)] for name, tensor in own.items()},
    }


def _without_weights(path: Path, layout: dict[str, Any]) -> PreTrainedModel:
    """The model of a directory's config.json, its parameters on the meta device, with rank 0's ties and formats."""
    with quiet(), _parameters_on_meta():
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        made: Any = AutoModelForCausalLM
        model: PreTrainedModel = made.from_config(config, attn_implementation=layout["attention"])
    given = model.state_dict(keep_vars=True)
    if given.keys() != layout["aliases"].keys():
        differing = sorted(given.keys() ^ layout["aliases"].keys())[:5]
        raise JackpotError(
            f"{path} is another model here than for rank 0 ({', '.join(differing)}); use one version of it"
        )
    for name, (shape, dtype) in layout["tensors"].items():
        if list(given[name].shape) != shape:
            raise JackpotError(
                f"{path} has {name} of shape {list(given[name].shape)} here and {shape} for rank 0; use one version "
                "of it"
            )
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=given[name].device)
        put_tensor(model, name, nn.Parameter(tensor) if isinstance(given[name], nn.Parameter) else tensor)
    tie(model, layout["aliases"])
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made meanwhile have parameters without memory. Their buffers, which no file holds, are made as ever."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
