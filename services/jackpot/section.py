"""What every section of the job file is made of: the strict base model, and numbers that are written as numbers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _refuse_words(value: Any) -> Any:
    """Numbers are written as numbers: '10' in quotes or `yes` is a slip that pydantic would convert silently."""
    if isinstance(value, (str, bool)):
        raise ValueError("is not a number. Write a plain number, without quotes")
    return value


# The check comes last, which is outermost: pydantic writes ranges into the JSON Schema only next to the type.
Number = BeforeValidator(_refuse_words)
Int = Annotated[int, Number]
Float = Annotated[float, Number]
PositiveInt = Annotated[int, Field(gt=0), Number]
NonNegativeInt = Annotated[int, Field(ge=0), Number]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), Number]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False), Number]
Fraction = Annotated[float, Field(ge=0, le=1), Number]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
Dtype = Literal["float32", "bfloat16", "float16"]


def refuse_shared_device(processes: int, device: str) -> None:
    """Several processes each need a GPU of their own.

    Raises:
        ValueError: one GPU is named for all of them.
    """
    if processes > 1 and device.startswith("cuda:"):
        raise ValueError(
            f"processes = {processes} cannot share device = {device!r}. "
            "Set device to cuda: each process takes a GPU of its own"
        )


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no silent conversion of strings into numbers."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )
