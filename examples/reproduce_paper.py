"""Reproduce the claims of the DARE paper on small models: train, merge, score, draw.

Usage: python3 examples/reproduce_paper.py

Needs Python 3.10 or later and nothing else; goes on where it was stopped. Results are written to
``examples/paper/results``.
"""

from __future__ import annotations

import os
import sys

from environment import PROJECT, prepare, run


def main() -> None:
    """Set up the environment and run ``python -m paper`` in it."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the models are local
    os.environ["PYTHONPATH"] = str(PROJECT / "examples")
    python = str(prepare(".[plot]") / "python")
    run(python, "-m", "paper", *sys.argv[1:])


if __name__ == "__main__":
    main()
