"""What may import what: the arrows between the package's wings, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import PROJECT

PACKAGE = PROJECT / "mergekit_dare"
# Of our own: the top level may import every wing. ``mergekit_dare`` is its version and register().
MAY_IMPORT = {
    "kernel": {"kernel"},
    "plugin": {"plugin", "kernel", "mergekit_dare"},
    "diagnostics": {"diagnostics", "plugin", "kernel", "mergekit_dare"},
}
WINGS = sorted(MAY_IMPORT)


def imported(path: Path) -> Iterator[str]:
    """Every module that is named in an import, with the names that are taken from it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wing(name: str) -> str:
    """``kernel`` for ``mergekit_dare.kernel.masks.mask_key``; the package for what is its own."""
    first, *rest = name.split(".")
    return rest[0] if rest and (PACKAGE / rest[0]).is_dir() else first


@pytest.mark.parametrize("name", WINGS)
def test_arrows_between_wings(name: str) -> None:
    modules = sorted((PACKAGE / name).glob("*.py"))
    assert len(modules) > 3
    for module in modules:
        ours = {wing(other) for other in imported(module) if other.split(".")[0] == PACKAGE.name}
        assert ours <= MAY_IMPORT[name], module


def test_the_kernel_knows_torch_alone() -> None:
    for module in (PACKAGE / "kernel").glob("*.py"):
        for name in imported(module):
            assert name.split(".")[0] not in {"mergekit", "click", "yaml", "safetensors"}, module


def test_every_module_lies_in_a_wing() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py"}
    folders = {path.name for path in PACKAGE.iterdir() if list(path.glob("*.py"))}
    assert folders == set(WINGS)
