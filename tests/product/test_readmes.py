"""Every command in any README is run by a test, or is marked as needing the hub or a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.running import PROJECT

READMES = sorted(
    path
    for path in PROJECT.rglob("README.md")
    if not {".venv", "work", "models"} & set(path.relative_to(PROJECT).parts)
    and not path.relative_to(PROJECT).parts[0].startswith((".", "out"))
)
# A command by its beginning, and the test that runs it, or what it needs.
RUN_BY = {
    "python3 examples/quickstart.py": "test_models_are_made_and_merged",
    "python3 tests/run.py": "this very run",
    "pip install .": "test_install_use_uninstall",
    "pip install examples/own_method": "test_the_example_of_a_method_of_ones_own",
    "uv tool install": "needs the package index",
    "pipx install": "needs the package index",
    "pip install 'mergekit[evolve]'": "needs the package index",
    'python -c "import mergekit.merge_methods': "test_command_to_see_that_it_is_active",
    "mergekit-dare check": "test_command",
    "mergekit-multi": "test_every_command_and_the_python_api_agree",
    "mergekit-yaml examples/recipes": "needs the hub",
    "mergekit-dare check examples/recipes": "test_our_examples_are_clean",
    "mergekit-dare explain examples/recipes": "test_layers_alone",
    "python examples/adapters.py": "test_models_are_made_and_merged",
    "python3 examples/reproduce_paper.py": "test_all_of_it_at_toy_size",
    "python examples/make_models.py": "test_models_are_made_and_merged",
    "python examples/evolve/search.py": "test_evolve",
    ".venv/bin/python -m tests.benchmarks": "a benchmark, never a test",
}


def commands(readme: Path) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith((" ", "#"))]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_commands_are_run_by_a_test(readme: Path) -> None:
    for command in commands(readme):
        assert any(command.startswith(known) for known in RUN_BY), command


def test_those_tests_are_there() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in PROJECT.glob("tests/**/*.py"))
    for test in RUN_BY.values():
        if test.startswith("test_"):
            assert f"def {test}" in sources or f"{test}.py" in {
                path.name for path in PROJECT.glob("tests/**/*.py")
            }, test


def test_a_newcomer_reads_the_readme_to_the_end() -> None:
    lines = (PROJECT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 250
    start = "\n".join(lines[:60])
    for command in ("python3 examples/quickstart.py", "python3 tests/run.py"):
        assert command in start


def test_links_lead_somewhere() -> None:
    for readme in READMES:
        text = readme.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if not link.startswith("http"):
                assert (readme.parent / link).exists(), f"{readme}: {link}"
