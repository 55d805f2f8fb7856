"""The files of a model directory, looked at before anything loads them: whole, safetensors, finite. No torch."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jackpot.errors import ConfigError

WEIGHTS_INDEX = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"

COMPLETE = "Download or export the model again, complete with config.json, *.safetensors and tokenizer.json."
_FULL_PRECISION = "Use the model's own weights in bfloat16 or float32; actor.quantization quantizes an actor's."
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_QUANTIZED_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F4"})
_QUANTIZED_NAMES = (".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv")
_LARGEST_HEADER = 100_000_000  # safetensors' own limit
_CHUNK = 1 << 22  # numbers looked at together

NUMBERS_BYTES = 1 << 30
"""Weights up to this size are read to look for NaN: about a second. Larger ones are looked at as they are loaded."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's entry in the header of a safetensors file."""

    dtype: str  # as safetensors writes it: F32, BF16, …
    start: int  # in the file, bytes
    end: int


def read_json(field: str, path: Path) -> dict[str, Any]:
    """A JSON object of a model directory.

    Raises:
        ConfigError: it is not there, or cannot be read.
    """
    _refuse_pointer(field, path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(field, str(path.parent), f"holds no {path.name}", COMPLETE) from None
    except (OSError, ValueError) as error:
        raise ConfigError(field, str(path.parent), f"its {path.name} cannot be read ({error})", COMPLETE) from None
    if not isinstance(data, dict):
        raise ConfigError(field, str(path.parent), f"its {path.name} is not a JSON object", COMPLETE)
    return data


def check_weight_files(field: str, directory: Path) -> None:
    """Check that all weights are there, whole and not quantized, by the headers of their files.

    Args:
        field: the setting that names the directory, for the message.
        directory: the model's.

    Raises:
        ConfigError: naming the file and what is wrong with it.
    """
    for path in _weight_files(field, directory):
        for name, tensor in _read_header(field, path).items():
            if tensor.dtype in _QUANTIZED_DTYPES or name.endswith(_QUANTIZED_NAMES):
                problem = f"its weights are quantized ({path.name} has {name} in {tensor.dtype})"
                raise ConfigError(field, str(directory), problem, _FULL_PRECISION)


def check_numbers(field: str, directory: Path) -> None:
    """Check that all weights are finite, if they are at most :data:`NUMBERS_BYTES` in all.

    Raises:
        ConfigError: naming a tensor with NaN or infinite values.
    """
    files = _weight_files(field, directory)
    if sum(path.stat().st_size for path in files) > NUMBERS_BYTES:
        return
    for path in files:
        header = _read_header(field, path)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for name, tensor in header.items():
                if not all(_all_finite(numbers, tensor.dtype) for numbers in _chunks(content, tensor)):
                    raise not_finite(field, str(directory), name)


def not_finite(field: str, model: str, tensor: str) -> ConfigError:
    """The refusal of a model one of whose tensors is not finite."""
    problem = f"its tensor {tensor} has NaN or infinite values"
    return ConfigError(field, model, problem, "Use weights of an earlier step, or download the model again.")


def refuse_quantized(field: str, model: str, config: Mapping[str, Any]) -> None:
    """Refuse a config.json that declares quantized weights: GPTQ, AWQ, FP8 and the like.

    Raises:
        ConfigError: they cannot be trained, and only some engines compute with them.
    """
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        problem = f"its weights are quantized ({method or 'by its quantization_config'})"
        raise ConfigError(field, model, problem, _FULL_PRECISION)


def _weight_files(field: str, directory: Path) -> list[Path]:
    """The files that transformers reads: one, or all that the index names."""
    index = directory / WEIGHTS_INDEX
    whole = directory / WEIGHTS_FILE
    if whole.exists():
        return [whole]
    if not index.exists():
        raise ConfigError(field, str(directory), f"holds no {_what_is_missing(directory)}", COMPLETE)
    shards = read_json(field, index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ConfigError(field, str(directory), f"its {index.name} has no weight_map", COMPLETE)
    files = sorted({directory / str(shard) for shard in shards.values()})
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ConfigError(field, str(directory), f"lacks {', '.join(missing)}", COMPLETE)
    return files


def _what_is_missing(directory: Path) -> str:
    if others := sorted(path.name for path in directory.glob("*.safetensors")):
        return f"{WEIGHTS_FILE} and no {WEIGHTS_INDEX}, only {others[0]}"
    if pickles := sorted(path.name for kind in _PICKLES for path in directory.glob(kind)):
        return f"*.safetensors, only {pickles[0]}, a pickle, which can run code when it is loaded"
    return "*.safetensors"


def _read_header(field: str, path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file whose size is the one that its header states."""
    _refuse_pointer(field, path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            problem = f"its {path.name} is cut short or is no safetensors file ({size} bytes)"
            raise ConfigError(field, str(path.parent), problem, COMPLETE)
        text = file.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        first = 8 + length
        tensors = {
            name: StoredTensor(entry["dtype"], *(first + int(at) for at in entry["data_offsets"]))
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(field, str(path.parent), f"its {path.name} has no readable header", COMPLETE) from None
    stated = max((tensor.end for tensor in tensors.values()), default=first)
    if size != stated:
        problem = f"its {path.name} has {size} bytes where its header states {stated}"
        raise ConfigError(field, str(path.parent), problem, COMPLETE)
    return tensors


def _refuse_pointer(field: str, path: Path) -> None:
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return  # what cannot be opened is reported by its reader
    if is_pointer:
        problem = f"its {path.name} is a Git LFS pointer, not the file itself"
        raise ConfigError(field, str(path.parent), problem, "Run `git lfs pull` in it, or download the model again.")


def _chunks(content: mmap.mmap, tensor: StoredTensor) -> Iterator[NDArray[Any]]:
    """A tensor's numbers, a part at a time; nothing for integers, which are always finite."""
    kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}.get(tensor.dtype)
    if kind is None:
        return
    step = _CHUNK * np.dtype(kind).itemsize
    for start in range(tensor.start, tensor.end, step):
        yield np.frombuffer(content[start : min(start + step, tensor.end)], dtype=kind)


def _all_finite(numbers: NDArray[Any], dtype: str) -> bool:
    if dtype == "BF16":
        return not bool(np.any((numbers & _BF16_EXPONENT) == _BF16_EXPONENT))
    return bool(np.isfinite(numbers).all())


_BF16_EXPONENT = 0x7F80  # all ones in NaN and infinities only
