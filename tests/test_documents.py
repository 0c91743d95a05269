"""Every page: its commands are run by a test or marked as needing more, its links and configs hold.

A page is any ``.md`` file of the project.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from mergekit_dare.diagnostics.checking import RULES
from tests.running import PROJECT, run_command

PAGES = sorted(
    path
    for path in PROJECT.rglob("*.md")
    if not {".venv", "work", "models"} & set(path.relative_to(PROJECT).parts)
    and not path.relative_to(PROJECT).parts[0].startswith((".", "out"))
)
README = (PROJECT / "README.md").read_text(encoding="utf-8")
LOADING = (PROJECT / "examples" / "guide" / "loading.md").read_text(encoding="utf-8")
# A command by its beginning, and the test that runs it, or what it needs.
RUN_BY = {
    "python3 examples/quickstart.py": "test_models_are_made_and_merged",
    "python3 tests/run.py": "this very run",
    "pip install git+URL": "test_install_use_uninstall",
    "pip install examples/own_method": "test_the_example_of_a_method_of_ones_own",
    "uv tool install": "needs the package index",
    "pipx install": "needs the package index",
    "pip install 'mergekit[evolve]'": "needs the package index",
    'python -c "import mergekit.merge_methods': "test_command_to_see_that_it_is_active",
    ". .venv/bin/activate": "what quickstart.py made",
    "mergekit-dare check": "test_command",
    "mergekit-dare explain": "test_explain",
    "mergekit-dare inspect": "test_inspect",
    "mergekit-dare verify": "test_verify",
    "mergekit-multi": "test_every_command_and_the_python_api_agree",
    "mergekit-yaml examples/recipes": "needs the hub",
    "mergekit-dare check examples/recipes": "test_our_examples_are_clean",
    "mergekit-dare explain examples/recipes": "test_layers_alone",
    "python examples/adapters.py": "test_models_are_made_and_merged",
    "python3 examples/reproduce_paper.py": "test_all_of_it_at_toy_size",
    "python examples/make_models.py": "test_models_are_made_and_merged",
    "python3 examples/search": "test_the_example_is_searched",
    "python examples/search": "test_ctrl_c_and_on",
    ".venv/bin/python -m tests.benchmarks": "a benchmark, never a test",
}


def of_pages(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda path: str(path.relative_to(PROJECT)))


def blocks(page: Path, language: str) -> list[str]:
    """The page's blocks of code in a language, which is empty for output."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith((" ", "#"))]


@of_pages(PAGES)
def test_commands_are_run_by_a_test(page: Path) -> None:
    for command in commands(page):
        assert any(command.startswith(known) for known in RUN_BY), command


def test_those_tests_are_there() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in PROJECT.glob("tests/**/*.py"))
    for test in RUN_BY.values():
        if test.startswith("test_"):
            assert f"def {test}" in sources or f"{test}.py" in {
                path.name for path in PROJECT.glob("tests/**/*.py")
            }, test


def test_a_newcomer_reads_the_readme_to_the_end() -> None:
    lines = README.splitlines()
    assert len(lines) <= 240
    start = "\n".join(lines[:60])
    for command in ("python3 examples/quickstart.py", "python3 tests/run.py"):
        assert command in start


def anchors(page: Path) -> set[str]:
    """The anchors of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@of_pages(PAGES)
def test_links_lead_somewhere(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text("utf-8")):
        if not link.startswith("http"):
            target = page.parent / link if link else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


@of_pages([page for page in PAGES if blocks(page, "yaml") and page.parent.name != "own_method"])
def test_configs_are_valid(page: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge_methods import get

    for block in blocks(page, "yaml"):
        for document in yaml.safe_load_all(block):
            document.pop("name", None)
            config = MergeConfiguration.model_validate(document)
            known = {p.name for p in get(config.merge_method).spec.parameters}
            for model in config.models or []:
                assert set(model.parameters or {}) <= known
            assert set(config.parameters or {}) <= known


@of_pages(PAGES)
def test_rules_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    ids = set(re.findall(r"\[([a-z\d]+-[a-z\d-]+)\]$", text, re.MULTILINE))
    for few in re.findall(r"(?:--ignore|# mergekit-dare: ignore)\s+([a-z][\w\-, ]*)", text):
        ids |= set(re.split(r"[, ]+", few.strip()))
    assert ids <= RULES.keys()
    if page.name == "rules.md":
        table = [line for line in text.splitlines() if line.startswith("|")]
        assert set(re.findall(r"`([a-z]+-[a-z-]+)`", "\n".join(table))) <= RULES.keys()


@pytest.mark.skipif(shutil.which("sed") is None, reason="needs sed")
@of_pages([page for page in PAGES if "$ sed " in page.read_text(encoding="utf-8")])
def test_what_check_prints(page: Path, tmp_path: Path) -> None:
    """A session of sed and check, which needs no models, prints what the page shows."""
    (tmp_path / "examples").mkdir()
    shutil.copy(PROJECT / "examples" / "dare.yml", tmp_path / "examples")
    (session,) = (block for block in blocks(page, "") if block.startswith("$ sed "))
    edit, check, *shown = session.splitlines()
    run_command("sh", "-c", edit.removeprefix("$ "), cwd=tmp_path)
    result = run_command(*check.split()[1:], cwd=tmp_path, check=False)
    assert result.stdout.splitlines() == shown


def test_the_start_up_line_is_shown() -> None:
    line = (PROJECT / "mergekit_dare" / "plugin" / "startup" / "mergekit_dare.pth").read_text()
    assert line.count("\n") == 1
    assert line in LOADING


@pytest.mark.slow
def test_command_to_see_that_it_is_active() -> None:
    (command,) = re.findall(r'^python -c "(.*get\(.*)"$', README, re.MULTILINE)
    result = run_command(sys.executable, "-c", command)
    assert f"prints `{result.stdout.strip()}`" in README
