"""Set up what the tests need and run them.

Usage: python3 tests/run.py [PYTEST ARGUMENTS]

Needs Python 3.10 or later and nothing else; can be run again. ``-m "not slow"`` is the quick
selection; ``--check`` runs the linter and the type checker as well. Half of them wait for other
processes, so two and more run at once (pytest-xdist); ``-n 0`` runs one after the other.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from environment import prepare, run

# Threads of torch that compete with those of other tests wait for each other most of the time: that
# makes the quick selection six times slower. Tests of threads set their number.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
AT_ONCE = ("-n", "auto", "--maxprocesses", "4", "--dist", "worksteal")


def main(arguments: list[str]) -> None:
    """Install the project with its test extra, then run pytest with ``arguments``."""
    programs = prepare("-e", ".[test]")
    python = str(programs / "python")
    if "--check" in arguments:
        arguments.remove("--check")
        run(python, "-m", "ruff", "check", ".")
        run(python, "-m", "ruff", "format", "--check", ".")
        run(python, "-m", "mypy")
    os.environ.update(ONE_THREAD)
    run(python, "-m", "pytest", *AT_ONCE, *arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
