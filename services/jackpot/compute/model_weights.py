"""Model weights as safetensors: writing, reading, checking against their model, and loading into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from jackpot.errors import WeightCorruptError

WEIGHTS_FILE = "model.safetensors"


def save_weights(model: nn.Module, directory: Path) -> None:
    """Write ``model.safetensors``, each tensor once (tied ones by their first name), under the model's own names."""
    tensors, _ = own_tensors(model)
    write_state({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}, directory)


@torch.no_grad()
def copy_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that :func:`save_weights` writes, copied to CPU memory, so that training may continue."""
    tensors, _ = own_tensors(model)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def write_state(state: Mapping[str, Tensor], directory: Path) -> None:
    """Write CPU tensors as ``model.safetensors``.

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
    tensors, aliases = own_tensors(model)
    return read_tensors(weights_dir, {name: list(tensor.shape) for name, tensor in tensors.items()}, aliases)


def read_tensors(
    weights_dir: Path,
    shapes: Mapping[str, list[int]],
    aliases: Mapping[str, str],
    rows: Mapping[str, slice] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Read tensors of a ``model.safetensors`` that must hold exactly a model's tensors.

    Args:
        weights_dir: a version's directory.
        shapes: the model's own tensors.
        aliases: the own name for every name of its state dict, see :func:`own_tensors`.
        rows: the rows to read of a tensor, along its first dimension; tensors not named here are read whole.

    Raises:
        WeightCorruptError: the file cannot be read, or its names or shapes are not the model's.
        FileNotFoundError: there is no such file.
    """
    path = weights_dir / WEIGHTS_FILE
    state: dict[str, Tensor] = {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for stored in file.keys():  # noqa: SIM118 - not a mapping
                name = aliases.get(stored)
                if name is None:
                    raise WeightCorruptError(f"{path}: tensor {stored!r} is not in the model. {_SAME_MODEL}")
                content = file.get_slice(stored)
                shape = list(content.get_shape())
                if shape != shapes[name]:
                    raise WeightCorruptError(
                        f"{path}: tensor {stored!r} has shape {shape}, the model's has {shapes[name]}. {_SAME_MODEL}"
                    )
                part = rows.get(name)
                # A copy: the file may be memory-mapped and cut short later.
                state[name] = (file.get_tensor(stored) if part is None else content[part]).clone()
                if not is_finite(state[name]):
                    raise WeightCorruptError(f"{path}: tensor {stored!r} has NaN or infinite values. {_DIVERGED}")
    except safetensors.SafetensorError as error:
        raise WeightCorruptError(f"{path} cannot be read ({error}). {_SAME_MODEL}") from None
    if missing := sorted(shapes.keys() - state.keys()):
        raise WeightCorruptError(f"{path} lacks {len(missing)} tensors ({', '.join(missing[:5])}). {_SAME_MODEL}")
    return state


def check_layout(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Check that these names and shapes are exactly the model's, each once.

    Raises:
        WeightCorruptError: naming the first that differs, or those missing.
    """
    tensors, aliases = own_tensors(model)
    for given, shape in shapes.items():
        name = aliases.get(given)
        if name is None:
            raise WeightCorruptError(f"tensor {given!r} is not in the model. {_SAME_MODEL}")
        if list(shape) != list(tensors[name].shape):
            expected = list(tensors[name].shape)
            raise WeightCorruptError(
                f"tensor {given!r} has shape {list(shape)}, the model's has {expected}. {_SAME_MODEL}"
            )
    if missing := sorted(tensors.keys() - {aliases[given] for given in shapes}):
        raise WeightCorruptError(f"{len(missing)} tensors are missing ({', '.join(missing[:5])}). {_SAME_MODEL}")


@torch.no_grad()
def apply_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors of :func:`read_state` into the model, in place, cast to its number format."""
    parameters, _ = own_tensors(model)
    for name, tensor in parameters.items():
        tensor.copy_(state[name])


def load_state(model: nn.Module, weights_dir: Path) -> None:
    """Replace the model's weights in place; on an error the model is unchanged. Errors as :func:`read_state`."""
    apply_state(model, read_state(model, weights_dir))


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
