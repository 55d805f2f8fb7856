"""Names are spelled in one place, and no two are so alike that one is taken for the other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import jackpot
from jackpot.storage.run_directory import RunFiles

PACKAGE = Path(jackpot.__file__).parent
ARCHITECTURE = PACKAGE.parents[1] / "docs" / "architecture.md"
LAYOUT = PACKAGE / "storage" / "run_directory.py"
ENTRIES = {name: entry for name, entry in vars(RunFiles).items() if type(entry).__name__ == "_Entry"}
FILE_NAMES = {entry.name for entry in ENTRIES.values() if "." in entry.name}
DIRECTORY_NAMES = {entry.name for entry in ENTRIES.values()} - FILE_NAMES
NOT_A_RUN = {
    ("control_plane/tokens.py", ".lock"),  # appended to the name of the token file
    ("demo/warmup.py", ".lock"),  # of a model in the cache
}


def python_files() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))]


def spelled_names(source: str) -> Iterator[tuple[int, str]]:
    """Where code, docstrings aside, spells a file of the run directory, or joins a path with a directory of it."""
    tree = ast.parse(source)
    joined: set[ast.expr] = set()
    docstrings: set[ast.expr] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            docstrings.add(node.value)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            joined.add(node.right.values[0] if isinstance(node.right, ast.JoinedStr) else node.right)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "joinpath":
            joined.update(node.args)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or node in docstrings:
            continue
        for name in FILE_NAMES:
            if re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.])", node.value):
                yield node.lineno, name
        if node in joined and node.value.split("/")[0] in DIRECTORY_NAMES:
            yield node.lineno, node.value


def test_only_the_layout_spells_the_names_of_a_run_directory() -> None:
    assert len(ENTRIES) > 25 and "metrics.jsonl" in FILE_NAMES and "manifests" in DIRECTORY_NAMES
    spelled = [
        f"{path.relative_to(PACKAGE)}:{line} spells {name!r}"
        for path in python_files()
        if path != LAYOUT
        for line, name in spelled_names(path.read_text(encoding="utf-8"))
        if (str(path.relative_to(PACKAGE)), name) not in NOT_A_RUN
    ]
    assert spelled == []


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ('path = run / "metrics.jsonl"', ["metrics.jsonl"]),
        ('raise Error(f"look at metrics.jsonl of {run}")', ["metrics.jsonl"]),
        ('path = run / "manifests"', ["manifests"]),
        ('path = run / f"weights/{role}"', ["weights/"]),
        ('path = run.joinpath("logs", name)', ["logs"]),
        ('"""What is in metrics.jsonl."""', []),
        ('orders.give("weights"); path = models / "old_metrics.jsonl"', []),
    ],
)
def test_a_spelled_name_is_found(source: str, names: list[str]) -> None:
    assert [name for _, name in spelled_names(source)] == names


def test_the_documentation_lists_every_entry_of_a_run_directory() -> None:
    section = ARCHITECTURE.read_text(encoding="utf-8").split("## Run directory")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    listed = {name.split("/")[0]: writer.strip() for names, writer in rows for name in re.findall(r"`([^`]+)`", names)}
    assert listed == {entry.name: entry.written_by for entry in ENTRIES.values()}


def test_no_two_modules_differ_by_an_s() -> None:
    by_name: dict[str, list[str]] = {}
    for path in python_files():
        by_name.setdefault(path.stem, []).append(str(path.relative_to(PACKAGE)))
    assert {name: (paths, by_name[f"{name}s"]) for name, paths in by_name.items() if f"{name}s" in by_name} == {}


def test_no_package_differs_by_an_s_from_what_it_holds_or_lies_beside() -> None:
    for package in (path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE):
        around = {path.stem for directory in (package, package.parent) for path in directory.iterdir()}
        assert not around & {f"{package.name}s", package.name.removesuffix("s")} - {package.name}, package
