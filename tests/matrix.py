"""Run tests with other versions of Python and of what mergekit needs.

Usage: python3 tests/matrix.py [--install] [--folder FOLDER] [ROW...]

Rows: oldest, newest, python3.12, python3.14. Each runs the quick selection, and gets an environment
of its own, of some 6 GB where torch comes with CUDA, in a temporary folder, or in FOLDER, where it
is kept: with --install it is made there, beside other work, and nothing is run. A row whose Python
is not on this machine is named and left out.
"""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.run import AT_ONCE, ONE_THREAD

PROJECT = Path(__file__).resolve().parent.parent
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
UV = Path.home() / ".local" / "share" / "uv" / "python"
# Run unless others are named: they have the oldest and the newest of everything.
USUAL = ("oldest", "newest")
TESTS = ["pytest", "pytest-xdist", "hypothesis", "matplotlib", "hatchling", "editables"]


class Row(NamedTuple):
    """An environment.

    Attributes:
        python: The version of Python.
        requirements: What is installed beside what the tests need.
        left_out: Tests that these versions of other packages cannot run.

    """

    python: str
    requirements: list[str]
    left_out: list[str]


# mergekit's --lazy-unpickle does not work with Python 3.13 and later.
LAZY_UNPICKLE = [
    "tests/end_to_end/test_family.py::test_options_and_pickled_inputs[lazy-unpickle-bin]",
    "tests/end_to_end/test_family.py::test_pytorch_with_pickled_and_other_files",
    "tests/end_to_end/test_by_name.py::test_pickled_weights[lazy-unpickle]",
]
ROWS = {
    # mergekit 0.1.5 admits torch 2.0, but needs transformers 5, which needs torch 2.4.
    "oldest": Row(
        "3.10",
        ["torch==2.4.0", "transformers==5.0.0", "safetensors==0.5.2", "mergekit==0.1.5"],
        # mergekit-moe's own check of what it wrote fails with this transformers.
        ["tests/end_to_end/test_family.py::test_moe_of_dare_outputs"],
    ),
    "python3.12": Row(
        "3.12", ["-c", str(PROJECT / "examples" / "constraints.txt"), "mergekit"], []
    ),
    "newest": Row(
        "3.13",
        ["mergekit", "torch", "transformers", "safetensors"],
        LAZY_UNPICKLE,
    ),
    "python3.14": Row(
        "3.14",
        ["mergekit", "torch", "transformers", "safetensors"],
        LAZY_UNPICKLE,
    ),
}


def interpreter(version: str) -> str | None:
    """Return a Python of this version: on the PATH, or one that pyenv or uv has."""
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(glob.glob(str(PYENV / "versions" / f"{version}.*" / "bin" / "python")))
    candidates += sorted(glob.glob(str(UV / f"cpython-{version}.*" / "bin" / f"python{version}")))
    for candidate in filter(None, candidates):
        asked = subprocess.run([candidate, "--version"], capture_output=True, check=False)
        if asked.returncode == 0:
            return candidate
    return None


def main(arguments: list[str]) -> None:
    """Install or run the rows; leave with exit code 1 if one of them failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        done = [_do(name, folder, options.install) for name in options.rows or USUAL]
    if not all(done):
        sys.exit(1)


def _do(name: str, folder: Path, only_install: bool) -> bool:
    python = interpreter(ROWS[name].python)
    if python is None:
        print(f"== {name}: no Python {ROWS[name].python} on this machine", flush=True)
        return True
    environment = folder / name
    made = environment / "made"
    if not made.exists():
        if not _install(ROWS[name], python, environment):
            print(f"== {name}: not installed", flush=True)
            return False
        made.touch()
    return only_install or _run(name, environment)


def _install(row: Row, python: str, environment: Path) -> bool:
    subprocess.run([python, "-m", "venv", environment], check=True)
    program = str(environment / "bin" / "python")
    for what in ([*row.requirements, "numba", *TESTS], ["--no-deps", str(PROJECT)]):
        pip = [program, "-m", "pip", "install", "--quiet", *what]
        if subprocess.run(pip, check=False).returncode != 0:
            return False
    return True


def _run(name: str, environment: Path) -> bool:
    row, program = ROWS[name], str(environment / "bin" / "python")
    shown = (
        "import platform, torch, transformers, safetensors as s; print(platform.python_version()"
    )
    shown += ", *(f'{m.__name__} {m.__version__}' for m in (torch, transformers, s)), sep=', ')"
    print(f"== {name}: Python ", end="", flush=True)
    subprocess.run([program, "-c", shown], check=True)
    pytest = [program, "-m", "pytest", "-q", "-p", "no:cacheprovider", *AT_ONCE]
    tests = ["-m", "not slow", *(f"--deselect={test}" for test in row.left_out)]
    result = subprocess.run(
        [*pytest, *tests], cwd=PROJECT, env=os.environ | ONE_THREAD, check=False
    )
    failed = result.returncode != 0
    print(f"== {name}: {'failed' if failed else 'passed'}", flush=True)
    return not failed


if __name__ == "__main__":
    main(sys.argv[1:])
