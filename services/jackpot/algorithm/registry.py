"""Variants that a job file selects by name. A package is searched for them, and they are parsed as one union.

Each variant is a :class:`Section` with a ``name``, in a separate module. No list names them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import reduce
from operator import or_
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field

from jackpot.section import Section

SectionT = TypeVar("SectionT", bound=Section)


def variants(package: ModuleType, base: type[SectionT]) -> dict[str, type[SectionT]]:
    """The subclasses of ``base`` that the package's modules define, by the name that a job file gives them.

    Raises:
        ValueError: two of them have the same name, or one has no name.
    """
    classes_by_name: dict[str, type[SectionT]] = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        for value in vars(module).values():
            if not isinstance(value, type) or not issubclass(value, base) or value is base:
                continue
            if value.__module__ != module.__name__:  # imported from the module that defines it
                continue
            name = value.model_fields["name"].default
            if not isinstance(name, str) or name in classes_by_name:
                raise ValueError(f"{value.__qualname__} needs a name of its own as the default of `name`, not {name!r}")
            classes_by_name[name] = value
    return dict(sorted(classes_by_name.items()))


def union_by_name(known: Mapping[str, type[Section]], default: str) -> Any:
    """The annotation of a field that holds one of these variants, selected by ``name``.

    ``field: tis`` is short for ``field: {name: tis}``; a mapping without a name configures the default.
    """

    def with_name(value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        return {"name": default, **value} if isinstance(value, dict) else value

    one_of: Any = Annotated[reduce(or_, known.values()), Field(discriminator="name")]
    or_a_name: Any = Literal[tuple(known)] | one_of
    return Annotated[one_of, BeforeValidator(with_name, json_schema_input_type=or_a_name)]
