"""Model weights as safetensors: writing, reading, checking against their model, and loading into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from jackpot.compute.hub_format import HubFormat
from jackpot.errors import WeightCorruptError

WEIGHTS_FILE = "model.safetensors"


def save_weights(model: nn.Module, directory: Path) -> None:
    """Write ``model.safetensors`` with the hub's names, each tensor once, as ``save_pretrained`` does."""
    tensors, _ = own_tensors(model)
    state = {name: tensor.detach().to("cpu") for name, tensor in tensors.items()}
    write_state(hub_format(model).to_hub(state), directory)


@torch.no_grad()
def copy_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that :func:`save_weights` writes, copied to CPU memory, so that training may continue."""
    tensors, _ = own_tensors(model)
    return hub_format(model).to_hub({name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()})


def write_state(state: Mapping[str, Tensor], directory: Path) -> None:
    """Write CPU tensors, by the hub's names, as ``model.safetensors``.

    Raises:
        WeightCorruptError: one has NaN or infinite values: nobody may sample or train with it.
    """
    for name, tensor in state.items():
        if not is_finite(tensor):
            raise WeightCorruptError(f"{name!r} has NaN or infinite values and is not written. {_DIVERGED}")
    save_file(dict(state), directory / WEIGHTS_FILE, metadata={"format": "pt"})


def read_state(model: nn.Module, weights_dir: Path) -> dict[str, Tensor]:
    """Read ``model.safetensors`` into memory and check that it fits the model, which stays unchanged.

    Returns:
        CPU tensors for :func:`apply_state`.

    Raises:
        WeightCorruptError: the file cannot be read, or its names or shapes are not the model's.
        FileNotFoundError: there is no such file (the version was pruned).
    """
    return read_tensors(weights_dir, hub_format(model))


def read_tensors(
    weights_dir: Path, names: HubFormat, rows: Mapping[str, slice] = MappingProxyType({})
) -> dict[str, Tensor]:
    """Read a ``model.safetensors`` that must hold exactly a model's tensors.

    Args:
        weights_dir: a version's directory.
        names: the model's.
        rows: the rows to read of a tensor, along its first dimension; tensors not named here are read whole.

    Returns:
        The model's own tensors, on the CPU.

    Raises:
        WeightCorruptError: the file cannot be read, or its names or shapes are not the model's.
        FileNotFoundError: there is no such file.
    """
    state: dict[str, Tensor] = {}
    with _open_weights(weights_dir) as file:
        stored = _stored_names(file, names, weights_dir / WEIGHTS_FILE)
        for name, sources in names.sources.items():
            if sources.converter is None and name in rows:
                # A copy: the file may be memory-mapped and cut short later.
                [(source, _)] = sources.names
                state[name] = _finite(file.get_slice(stored[source])[rows[name]].clone(), source, weights_dir)
                continue
            parts = {
                source: _finite(file.get_tensor(stored[source]), source, weights_dir) for source, _ in sources.names
            }
            for made, tensor in names.convert(name, parts).items():
                state[made] = tensor[rows.get(made, slice(None))].clone() if tensor.dim() else tensor.clone()
    return state


def read_hub_tensors(weights_dir: Path, names: HubFormat) -> dict[str, Tensor]:
    """As :func:`read_tensors`, but the hub's tensors."""
    with _open_weights(weights_dir) as file:
        stored = _stored_names(file, names, weights_dir / WEIGHTS_FILE)
        return {
            name: _finite(file.get_tensor(in_file).clone(), in_file, weights_dir) for name, in_file in stored.items()
        }


def check_layout(names: HubFormat, shapes: Mapping[str, Sequence[int]], where: str = "") -> dict[str, str]:
    """Check that these names and shapes are exactly the hub's for a model, each once.

    Args:
        names: the model's.
        shapes: of the tensors to check.
        where: begins the messages.

    Returns:
        The given name by the hub's, from which it may differ where tensors are tied.

    Raises:
        WeightCorruptError: naming the first that differs, or those missing.
    """
    given_by_name: dict[str, str] = {}
    for given, shape in shapes.items():
        name = names.hub_name(given)
        if name is None:
            raise WeightCorruptError(f"{where}tensor {given!r} is not in the model. {_SAME_MODEL}")
        if list(shape) != names.layout[name]:
            raise WeightCorruptError(
                f"{where}tensor {given!r} has shape {list(shape)}, the model's has {names.layout[name]}. {_SAME_MODEL}"
            )
        given_by_name[name] = given
    if missing := sorted(names.layout.keys() - given_by_name.keys()):
        raise WeightCorruptError(f"{where}lacks {len(missing)} tensors ({', '.join(missing[:5])}). {_SAME_MODEL}")
    return given_by_name


def _finite(tensor: Tensor, stored: str, weights_dir: Path) -> Tensor:
    """The tensor, if it is finite."""
    if not is_finite(tensor):
        path = weights_dir / WEIGHTS_FILE
        raise WeightCorruptError(f"{path}: tensor {stored!r} has NaN or infinite values. {_DIVERGED}")
    return tensor


@contextmanager
def _open_weights(weights_dir: Path) -> Iterator[Any]:
    path = weights_dir / WEIGHTS_FILE
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise WeightCorruptError(f"{path} cannot be read ({error}). {_SAME_MODEL}") from None


def _stored_names(file: Any, names: HubFormat, path: Path) -> dict[str, str]:
    shapes = {stored: file.get_slice(stored).get_shape() for stored in file.keys()}  # noqa: SIM118 - not a mapping
    return check_layout(names, shapes, f"{path}: ")


@torch.no_grad()
def apply_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors of :func:`read_state` into the model, in place, cast to its number format."""
    parameters, _ = own_tensors(model)
    for name, tensor in parameters.items():
        tensor.copy_(state[name])


def load_state(model: nn.Module, weights_dir: Path) -> None:
    """Replace the model's weights in place; on an error the model is unchanged. Errors as :func:`read_state`."""
    apply_state(model, read_state(model, weights_dir))


def hub_format(model: nn.Module) -> HubFormat:
    """The hub's names for a model of transformers."""
    assert isinstance(model, PreTrainedModel)
    return HubFormat(model, *own_tensors(model))


def own_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A model's tensors, each once, and the name of its tensor for every name of the state dict."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        aliases[name] = first_name.setdefault(id(tensor), name)
        tensors[aliases[name]] = tensor
    return tensors, aliases


def tie(model: nn.Module, aliases: Mapping[str, str]) -> None:
    """Map each name of the state dict to its tensor, see :func:`own_tensors`."""
    tensors = model.state_dict(keep_vars=True)
    for name, owner in aliases.items():
        if name != owner and tensors[name] is not tensors[owner]:
            put_tensor(model, name, tensors[owner])


def put_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer by its name in the state dict."""
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, tensor)


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite. Takes no memory; what has no numbers yet counts as finite."""
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
        return True
    least, greatest = tensor.aminmax()  # NaN if any is
    return bool(least.isfinite() & greatest.isfinite())


_DIVERGED = "Look for a diverged loss in the learner's log; go on from an earlier checkpoint, with a lower learner.lr."
_SAME_MODEL = "Weights must come from a model of the same configuration."
