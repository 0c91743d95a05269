"""A virtual environment with pinned versions, for the commands of the README.

Uses the standard library alone. Everything goes into ``.venv`` in the project's folder, or into
the folder that the environment variable ``VENV`` names.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
CONSTRAINTS = PROJECT / "examples" / "constraints.txt"


def prepare(*requirements: str) -> Path:
    """Make the environment if it is not there, install into it, return its folder of programs.

    torch comes first and pinned: mergekit's own requirement would take any version of it.
    """
    folder = Path(os.environ.get("VENV", PROJECT / ".venv"))
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    python = programs / "python"
    if not (folder / "pyvenv.cfg").exists():
        print(f"Making the environment {folder}", flush=True)
        venv.create(folder, with_pip=True)
    torch = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch="))
    for what in ([torch], ["-c", str(CONSTRAINTS), *requirements]):
        print("Installing", what[-1], flush=True)
        run(str(python), "-m", "pip", "install", "--quiet", *what)
    return programs


def run(*command: str) -> None:
    """Run a command in the project's folder; leave with its exit code if that is not 0."""
    result = subprocess.run(command, cwd=PROJECT, check=False)
    if result.returncode != 0:
        sys.exit(result.returncode)
