"""Imports go one way: tensor -> nn -> model -> stages -> pipeline -> cli, with data and recipe beside model."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "bondsmith"
LEVELS = {
    "_version": 0,
    "tensor": 0,
    "nn": 1,
    "recipe": 1,
    "data": 2,
    "model": 2,
    "stages": 3,
    "rundir": 3,
    "limits": 4,
    "run": 4,
    "planner": 5,
    "healing": 5,
    "scoring": 6,
    "pipeline": 6,
    "profiling": 5,
    "cli": 7,
}
HOME = "bondsmith"


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" if node.module == HOME else node.module for alias in node.names}
    return names


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_no_room_imports_a_later_one() -> None:
    wrong = []
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if parts == ("__init__",):
            continue
        level = LEVELS[parts[0]]
        for module in imported(path):
            if module.startswith(HOME + ".") and LEVELS[room(module)] > level:
                wrong.append(f"{path.relative_to(SOURCE)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_the_mathematics_imports_torch_only() -> None:
    allowed = {
        "torch",
        "bondsmith",
        "__future__",
        "math",
        "dataclasses",
        "collections",
        "typing",
        "functools",
        "itertools",
    }
    standard = allowed | {"re", "pathlib", "json", "time", "logging"}
    for path in (SOURCE / "tensor").glob("*.py"):
        outside = {name.split(".")[0] for name in imported(path)} - standard
        assert not outside, f"{path.name} imports {outside}"
