"""What may import what: the arrows between the package's wings and rooms, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import PROJECT

PACKAGE = PROJECT / "mergekit_dare"
# Each wing may import those after it; ``mergekit_dare`` is the package's version and register().
WINGS = ["cli", "commands", "by_name", "diagnostics", "plugin", "kernel"]
# The same inside ``diagnostics``; those of one line do not know each other.
ROOMS = [
    {"suggestion", "input_record"},
    {"checking", "verification"},
    {"repetition", "deltas"},
    {"examination"},
    {"plan"},
    {"models"},
    {"config"},
    {"rules"},
    {"findings", "installation"},
]
MOST_LINES, MOST_MODULES = 400, 13


def imported(path: Path) -> Iterator[str]:
    """Every module that is named in an import, with the names that are taken from it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def ours(path: Path) -> Iterator[tuple[str, ...]]:
    """The modules of this package that one imports, in parts, without the package's name."""
    for name in imported(path):
        first, *rest = name.split(".")
        if first == PACKAGE.name:
            yield tuple(rest)


@pytest.mark.parametrize("wing", WINGS[1:])
def test_arrows_between_wings(wing: str) -> None:
    may = set(WINGS[WINGS.index(wing) :]) - ({"cli"} if wing != "cli" else set())
    for path in modules(PACKAGE / wing):
        for parts in ours(path):
            is_wing = bool(parts) and parts[0] in WINGS
            assert not is_wing or parts[0] in may, (path, parts)
            assert is_wing or wing != "kernel", (path, parts)


def test_arrows_between_rooms() -> None:
    level = {room: index for index, rooms in enumerate(ROOMS) for room in rooms}
    folder = PACKAGE / "diagnostics"
    found = {path.name.removesuffix(".py") for path in folder.iterdir() if path.stem[0] != "_"}
    assert found == level.keys()
    for path in modules(folder):
        room = path.relative_to(folder).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for parts in ours(path):
            if parts[:1] == ("diagnostics",) and parts[1] != room:
                assert level[parts[1]] > level[room], (path, parts)


def test_the_kernel_knows_torch_alone() -> None:
    for module in modules(PACKAGE / "kernel"):
        for name in imported(module):
            assert name.split(".")[0] not in {"mergekit", "click", "yaml", "safetensors"}, module


def test_every_module_lies_in_a_wing() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py"}
    folders = {path.name for path in PACKAGE.iterdir() if list(path.glob("*.py"))}
    assert folders == set(WINGS) - {"cli"}


def test_nothing_is_too_large_to_be_known() -> None:
    for path in modules(PACKAGE):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES, path
    for folder in {path.parent for path in modules(PACKAGE)}:
        assert len(list(folder.glob("*.py"))) <= MOST_MODULES, folder
        assert (folder / "__init__.py").read_text(encoding="utf-8").startswith('"""'), folder
