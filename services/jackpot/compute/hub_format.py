"""The hub's names for a model's tensors. transformers renames, stacks and splits some of them as it loads a model.

Weight files carry the hub's names, as ``save_pretrained`` writes them: vLLM and every version of transformers read
those. Within a process a model keeps transformers' own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


@dataclass(slots=True)
class Sources:
    """The hub's tensors behind one or several of the model's: one as it is, or what a converter takes."""

    converter: WeightConverter | None
    names: list[tuple[str, str]] = field(default_factory=list)
    """Each hub name, and the converter's pattern that it matches."""


class HubFormat:
    """The way from a model's tensors to the hub's, and back.

    Args:
        model: whole, sharded, or on the meta device.
        tensors: its tensors, each once.
        aliases: the name among them for every name of the model's state dict.
    """

    def __init__(self, model: PreTrainedModel, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
        self._model = model
        self._aliases = dict(aliases)
        self.shapes: dict[str, list[int]] = {name: list(tensor.shape) for name, tensor in tensors.items()}
        """The model's own tensors."""
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        placeholders = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()
        }
        self.layout: dict[str, list[int]] = {
            name: list(tensor.shape) for name, tensor in self.to_hub(placeholders).items()
        }
        """Name and shape of each of the hub's tensors."""
        self.sources: dict[str, Sources] = self._sources()
        """The hub's tensors behind each of the model's; behind the first where a converter makes several."""
        self._hub_name = {name: sources.names[0][0] for name, sources in self.sources.items() if not sources.converter}

    def to_hub(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What ``save_pretrained`` would write of the model's own tensors; contiguous, and shared where unchanged."""
        reverted: Mapping[str, Tensor] = revert_weight_conversion(self._model, dict(state))
        return {name: tensor.contiguous() for name, tensor in reverted.items()}

    def hub_name(self, stored: str) -> str | None:
        """The name in :attr:`layout` of a tensor in a file, perhaps of a tied one; None if the model has none such."""
        if stored in self.layout:
            return stored
        name, _ = rename_source_key(stored, self._renamings, [])
        return self._hub_name.get(self._aliases.get(name, ""))

    def convert(self, name: str, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors made from the hub's.

        Args:
            name: the key in :attr:`sources`.
            sources: its hub tensors, by name.
        """
        wanted = self.sources[name]
        if wanted.converter is None:
            return {name: sources[wanted.names[0][0]]}
        converter = deepcopy(wanted.converter)
        for source, pattern in wanted.names:
            converter.add_tensor(name, source, pattern, sources[source])  # type: ignore[arg-type] # annotated for loading
        made = converter.convert(name, model=self._model, config=self._model.config)
        return {made_name: part[0] if isinstance(part, list) else part for made_name, part in made.items()}

    def _sources(self) -> dict[str, Sources]:
        by_pattern = {pattern: converter for converter in self._converters for pattern in converter.source_patterns}
        sources: dict[str, Sources] = {}
        for hub_name in sorted(self.layout, key=dot_natural_key):
            name, pattern = rename_source_key(hub_name, self._renamings, self._converters)
            if name not in self._aliases and hub_name in self._aliases:
                name, pattern = hub_name, None  # a name that only looks like one to convert
            name = self._aliases.get(name, name)
            converter = None if pattern is None else by_pattern[pattern]
            sources.setdefault(name, Sources(converter)).names.append((hub_name, pattern or ""))
        return sources
