"""Run tests with other versions of Python and of what mergekit needs.

Usage: python3 tests/matrix.py [ROW...]; rows: oldest, newest, python3.12

They are the quick selection, and those of compiled code, which torch makes its own way in each
version. Each row gets an environment of its own in a temporary folder, of some 6 GB where torch
comes with CUDA. A row whose Python is not on this machine is named and left out.
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
# Run unless others are named: they have the oldest and the newest of everything.
USUAL = ("oldest", "newest")
# Of compiled code, one test for each way through it.
COMPILED = "same_bits and bfloat16 or sampling_and_rounding and bfloat16 or one_line"
TESTS = ["pytest", "hypothesis", "matplotlib", "hatchling", "editables"]
# Name: Python, requirements, tests that this row's versions of other packages cannot run.
ROWS: dict[str, tuple[str, list[str], list[str]]] = {
    # mergekit 0.1.5 admits torch 2.0, but needs transformers 5, which needs torch 2.4.
    "oldest": (
        "3.10",
        ["torch==2.4.0", "transformers==5.0.0", "safetensors==0.5.2", "mergekit==0.1.5"],
        # mergekit-moe's own check of what it wrote fails with this transformers.
        ["tests/product/test_family.py::test_moe_of_dare_outputs"],
    ),
    "python3.12": ("3.12", ["-c", str(PROJECT / "examples" / "constraints.txt"), "mergekit"], []),
    "newest": (
        "3.13",
        ["mergekit", "torch", "transformers", "safetensors"],
        # mergekit's --lazy-unpickle does not work with Python 3.13.
        [
            "tests/product/test_family.py::test_options_and_pickled_inputs[lazy-unpickle-bin]",
            "tests/product/test_family.py::test_pytorch_with_pickled_and_other_files",
        ],
    ),
}


def interpreter(version: str) -> str | None:
    """Return a Python of this version: on the PATH, or one that pyenv has."""
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(glob.glob(str(PYENV / "versions" / f"{version}.*" / "bin" / "python")))
    for candidate in filter(None, candidates):
        asked = subprocess.run([candidate, "--version"], capture_output=True, check=False)
        if asked.returncode == 0:
            return candidate
    return None


def main(names: list[str]) -> None:
    """Run the rows; leave with exit code 1 if one of them failed."""
    failed = []
    for name in names or USUAL:
        version, requirements, left_out = ROWS[name]
        python = interpreter(version)
        if python is None:
            print(f"== {name}: no Python {version} on this machine", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            if not _run_row(name, python, Path(folder), requirements, left_out):
                failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _run_row(
    name: str, python: str, folder: Path, requirements: list[str], left_out: list[str]
) -> bool:
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    program = str(folder / "venv" / "bin" / "python")
    for what in ([*requirements, *TESTS], ["--no-deps", str(PROJECT)]):
        pip = [program, "-m", "pip", "install", "--quiet", *what]
        result = subprocess.run(pip, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            print(result.stderr, f"== {name}: not installed", sep="\n", flush=True)
            return False
    shown = (
        "import platform, torch, transformers, safetensors as s; print(platform.python_version()"
    )
    shown += ", *(f'{m.__name__} {m.__version__}' for m in (torch, transformers, s)), sep=', ')"
    print(f"== {name}: Python ", end="", flush=True)
    subprocess.run([program, "-c", shown], check=True)
    deselected = [f"--deselect={test}" for test in left_out]
    pytest = [program, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    compiled = ["tests/kernel/test_compiled.py", "-k", COMPILED]
    selections = (["-m", "not slow", *deselected], compiled)
    return all(
        subprocess.run([*pytest, *selection], cwd=PROJECT, check=False).returncode == 0
        for selection in selections
    )


if __name__ == "__main__":
    main(sys.argv[1:])
