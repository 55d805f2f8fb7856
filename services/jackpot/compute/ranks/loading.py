"""Loads a model for several ranks: rank 0 reads it tensor by tensor, and each rank holds only its rows of each tensor.

On rank 0 transformers loads the model, with its renamings, conversions and number formats. Each parameter is taken away
as soon as it is read: every rank receives its rows, and a placeholder on the meta device remains. The other ranks build
the model from its config.json. Together the ranks hold exactly what :func:`load_causal_lm` would have loaded.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from jackpot.compute.model_loading import quiet, read_causal_lm, read_configuration
from jackpot.compute.model_weights import is_finite, own_tensors, put_tensor, tie
from jackpot.compute.models import set_longest, set_vocabulary
from jackpot.compute.ranks.group import Ranks
from jackpot.compute.ranks.sharding import HELD, rows_of
from jackpot.errors import ConfigError, JackpotError
from jackpot.storage.model_files import not_finite

LOG = logging.getLogger(__name__)

# transformers' mark on a parameter that it has read, before it puts it into its module.
_READ_MARK = "_is_hf_initialized"
# By default transformers reads far ahead of what it puts into the model.
_READ_IN_TURN = "HF_DEACTIVATE_ASYNC_LOAD"


def load_on_ranks(
    model_dir: str,
    dtype: str,
    ranks: Ranks,
    device: torch.device,
    *,
    field: str,
    context_length: int | None = None,
    vocabulary: int | None = None,
) -> PreTrainedModel:
    """A model for :func:`jackpot.compute.ranks.sharding.shard`, in eval mode, not yet checked; a collective.

    Args:
        model_dir: a directory with config.json and, for rank 0, \\*.safetensors.
        dtype: number format of the weights.
        ranks: all of them.
        device: where this rank's rows go as they are read.
        field: the setting that named the directory, for error messages.
        context_length: as for :func:`load_causal_lm`.
        vocabulary: V, as of :func:`load_causal_lm`.

    Returns:
        The model with its parameters on the meta device, and this rank's rows of them as attribute ``HELD``.

    Raises:
        ConfigError: as :func:`load_causal_lm`, on all ranks, but without the check of its logits.
        RankLostError: a rank is gone, or took longer than ``collective_timeout_seconds`` for a tensor.
    """
    if ranks.rank == 0:
        model, held = _hand_out(model_dir, dtype, ranks, device, field, context_length)
    else:
        model, held = _take_up(Path(model_dir), ranks, device, context_length)
    setattr(model, HELD, held)
    set_vocabulary(model, vocabulary)
    set_longest(model, model_dir, field, context_length)
    return model


Loaded = tuple[PreTrainedModel, dict[str, Tensor]]


def _hand_out(
    model_dir: str, dtype: str, ranks: Ranks, device: torch.device, field: str, context_length: int | None
) -> Loaded:
    """Rank 0's part: read the model, and send every rank its rows."""
    given = _Handout(ranks, device)
    try:
        with _read_in_turn(), _registering(given.take_away):
            model = read_causal_lm(model_dir, dtype, field=field, context_length=context_length)
        given.take_rest(model)
        given.tie_equals(model)
        distinct, aliases = own_tensors(model)
        numbers = {name: given.number_of[tensor] for name, tensor in distinct.items()}
        for name, number in numbers.items():
            if number in given.not_finite:
                raise not_finite(field, model_dir, name)
    except ConfigError as error:
        given.tell({"refused": [error.field, str(error.value), error.problem, error.remedy]})
        raise
    tensors = {name: [numbers[name], list(tensor.shape), _name(tensor.dtype)] for name, tensor in distinct.items()}
    attention, made_in = model.config._attn_implementation, _name(model.dtype)
    given.tell({"attention": attention, "dtype": made_in, "aliases": aliases, "tensors": tensors})
    return model, {name: given.parts[number] for name, number in numbers.items()}


def _take_up(path: Path, ranks: Ranks, device: torch.device, context_length: int | None) -> Loaded:
    """Another rank's part: receive rows as rank 0 reads them, and build their model."""
    parts: list[Tensor] = []
    while True:
        answer = json.loads(ranks.broadcast())
        if "refused" in answer:
            raise ConfigError(*answer["refused"])
        if "equal" in answer:
            ranks.agree(_equal(parts, answer["equal"]))
        elif "part" in answer:
            part = _Part(*answer["part"])
            received = torch.empty(part.shape_on(ranks), dtype=getattr(torch, part.dtype))
            if received.numel():
                ranks.receive_(received)
            parts.append(received.to(device))
        else:
            held = {name: parts[number] for name, (number, _, _) in answer["tensors"].items()}
            return _without_weights(path, answer, context_length), held


@dataclass(frozen=True, slots=True)
class _Part:
    """Rank 0's description of a tensor before it sends it."""

    shape: list[int]  # of the whole
    dtype: str
    by_rows: bool  # parameters are sharded, buffers are not

    def rows(self, ranks: Ranks, rank: int) -> slice:
        """The rows that a rank holds."""
        return rows_of(self.shape[0], ranks.size, rank)

    def shape_on(self, ranks: Ranks) -> list[int]:
        """Shape of this rank's part."""
        if not self.by_rows:
            return self.shape
        rows = self.rows(ranks, ranks.rank)
        return [rows.stop - rows.start, *self.shape[1:]]


class _Handout:
    """The tensors that rank 0 has read and sent out.

    Args:
        ranks: the receivers.
        device: where rank 0's own rows go.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks = ranks
        self._device = device
        self.parts: list[Tensor] = []
        """Rank 0's own rows, in the order in which tensors were sent."""
        self.number_of: dict[Tensor, int] = {}
        """The index in that order of each placeholder in the model."""
        self.not_finite: set[int] = set()
        """The indices of parameters with NaN or infinite values."""

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message to the other ranks."""
        self._ranks.broadcast(json.dumps(message).encode())

    def take_away(self, parameter: nn.Parameter) -> nn.Parameter:
        """Send out a parameter that has been read; returns its placeholder."""
        if parameter.is_meta or not getattr(parameter, _READ_MARK, False):
            return parameter
        return self._replaced(parameter)

    def take_rest(self, model: nn.Module) -> None:
        """Send out buffers, and parameters that transformers did not mark as read: those that it created itself, or all
        of them should it ever stop marking them."""
        unmarked = []
        distinct, aliases = own_tensors(model)
        for name, tensor in distinct.items():
            if not isinstance(tensor, nn.Parameter):
                self.number_of[tensor] = self._give(tensor, by_rows=False)
            elif not tensor.is_meta:
                unmarked.append(name)
                put_tensor(model, name, self._replaced(tensor))
        tie(model, aliases)
        if unmarked:
            LOG.warning(
                "rank 0 held %d tensors whole until the last was read (%s, ...)", len(unmarked), ", ".join(unmarked[:3])
            )

    def tie_equals(self, model: PreTrainedModel) -> None:
        """Tie tensors that the configuration ties and the file holds twice, if they are equal. transformers compares
        their values, which it cannot see here."""
        for name, other in model.all_tied_weights_keys.items():
            tensors = model.state_dict(keep_vars=True)
            if tensors[name] is tensors[other]:
                continue
            pair = [self.number_of[tensors[name]], self.number_of[tensors[other]]]
            self.tell({"equal": pair})
            if self._ranks.agree(_equal(self.parts, pair)):
                put_tensor(model, name, tensors[other])

    def _replaced(self, parameter: nn.Parameter) -> nn.Parameter:
        placeholder = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        setattr(placeholder, _READ_MARK, True)
        self.number_of[placeholder] = self._give(parameter, by_rows=True)
        return placeholder

    @torch.no_grad()
    def _give(self, tensor: Tensor, *, by_rows: bool) -> int:
        part = _Part(list(tensor.shape), _name(tensor.dtype), by_rows)
        if by_rows and not is_finite(tensor.detach()):
            self.not_finite.add(len(self.parts))
        self.tell({"part": [part.shape, part.dtype, by_rows]})
        for rank in range(1, self._ranks.size):
            content = tensor[part.rows(self._ranks, rank)] if by_rows else tensor
            if content.numel():
                self._ranks.send(content.contiguous(), rank)
        content = tensor[part.rows(self._ranks, 0)] if by_rows else tensor
        # A copy: neither the rest of the tensor nor the file may stay in use.
        copied = torch.empty(content.shape, dtype=content.dtype, device=self._device).copy_(content)
        self.parts.append(copied)
        return len(self.parts) - 1


def _equal(parts: list[Tensor], pair: list[int]) -> bool:
    return torch.equal(parts[pair[0]], parts[pair[1]])


def _without_weights(path: Path, layout: dict[str, Any], context_length: int | None) -> PreTrainedModel:
    """The model of a directory's config.json, its parameters on the meta device, with rank 0's ties and formats."""
    config = read_configuration(path, context_length=context_length)
    with quiet(), _registering(_on_meta):
        made: Any = AutoModelForCausalLM
        # In rank 0's number format, not the file's: buffers that no file holds are computed in it.
        dtype = getattr(torch, layout["dtype"])
        model: PreTrainedModel = made.from_config(config, dtype=dtype, attn_implementation=layout["attention"])
    given = model.state_dict(keep_vars=True)
    if given.keys() != layout["aliases"].keys():
        differing = sorted(given.keys() ^ layout["aliases"].keys())[:5]
        raise JackpotError(f"{path} differs from rank 0's model ({', '.join(differing)}); use one version of it")
    for name, (_, shape, number_format) in layout["tensors"].items():
        if list(given[name].shape) != shape:
            raise JackpotError(
                f"{path} has {name} of shape {list(given[name].shape)} here and {shape} for rank 0; use one version "
                "of it"
            )
        tensor = torch.empty(shape, dtype=getattr(torch, number_format), device=given[name].device)
        put_tensor(model, name, nn.Parameter(tensor) if isinstance(given[name], nn.Parameter) else tensor)
    tie(model, layout["aliases"])
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter without memory. Buffers, which no file holds, are created as usual."""
    if parameter.is_meta:
        return parameter
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _registering(replace: Callable[[nn.Parameter], nn.Parameter]) -> Iterator[None]:
    """Within the block, each parameter put into a module is replaced by the result of ``replace``."""
    register = nn.Module.register_parameter

    def replaced(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else replace(parameter))

    nn.Module.register_parameter = replaced  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def _read_in_turn() -> Iterator[None]:
    """Have transformers read each tensor only when it puts it into the model."""
    before = os.environ.get(_READ_IN_TURN)
    os.environ[_READ_IN_TURN] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_READ_IN_TURN]
        else:
            os.environ[_READ_IN_TURN] = before
