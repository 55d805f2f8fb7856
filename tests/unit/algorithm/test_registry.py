"""Corrections and advantages are found by looking through their packages, and documented."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

from jackpot.algorithm.advantages import ADVANTAGES
from jackpot.algorithm.corrections import CORRECTIONS
from jackpot.algorithm.registry import variants
from jackpot.section import Section

METHOD = Path(__file__).parents[3] / "docs" / "method.md"


def rows_under(heading: str) -> set[str]:
    """The first cells of the tables under a heading of docs/method.md, without their quotes."""
    text = METHOD.read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)`", section, flags=re.MULTILINE))


def test_the_packages_hold_what_the_paper_compares() -> None:
    assert {"none", "is", "tis", "icepop", "mis", "jackpot"} <= set(CORRECTIONS)
    assert {"grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"} <= set(ADVANTAGES)


@pytest.mark.parametrize(("known", "heading"), [(CORRECTIONS, "Corrections"), (ADVANTAGES, "Advantages")])
def test_the_docs_have_a_row_for_each_and_for_no_other(known: Mapping[str, type[Section]], heading: str) -> None:
    assert rows_under(heading) == set(known)


@pytest.mark.parametrize("known", [CORRECTIONS, ADVANTAGES])
def test_each_has_an_equation_to_read_and_works_by_its_name_alone(known: Mapping[str, type[Section]]) -> None:
    for name, variant in known.items():
        assert variant.__doc__
        assert variant.model_validate({"name": name}) == variant()


def test_their_settings_load_without_torch() -> None:
    script = (
        "import sys, jackpot.algorithm.corrections, jackpot.algorithm.advantages; assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package without modules, ready to be imported as ``shapes``."""
    (tmp_path / "shapes").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("shapes", "shapes.round", "shapes.square"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path / "shapes"


class Shape(Section):
    """What the package's modules derive from."""

    name: str


def module(class_name: str, name: str) -> str:
    return (
        "from typing import Literal\nfrom test_registry_shapes import Shape\n"
        f"class {class_name}(Shape):\n    name: Literal[{name!r}] = {name!r}\n"
    )


def found_in(package: Path, modules: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, type[Shape]]:
    base = ModuleType("test_registry_shapes")
    base.Shape = Shape  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "test_registry_shapes", base)
    for name, text in {"__init__": "", **modules}.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    return variants(__import__("shapes"), Shape)


def test_a_module_is_enough_to_be_known(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = found_in(shapes, {"square": module("Square", "square"), "round": module("Round", "disc")}, monkeypatch)
    assert {name: variant.__name__ for name, variant in known.items()} == {"disc": "Round", "square": "Square"}


def test_two_of_one_name_are_refused(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Square needs a name of its own"):
        found_in(shapes, {"square": module("Square", "disc"), "round": module("Round", "disc")}, monkeypatch)


def test_one_without_a_name_is_refused(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nameless = "from test_registry_shapes import Shape\nclass Round(Shape):\n    pass\n"
    with pytest.raises(ValueError, match="Round needs a name of its own"):
        found_in(shapes, {"round": nameless}, monkeypatch)
