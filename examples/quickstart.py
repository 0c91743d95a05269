"""Set up everything, make the example models, merge them with mergekit-yaml, look at the result.

Usage: python3 examples/quickstart.py

Needs Python 3.10 or later and nothing else; can be run again.
"""

from __future__ import annotations

import os
import shutil

from environment import PROJECT, prepare, run


def main() -> None:
    """Run ``mergekit-yaml examples/dare.yml out/`` and what it needs before and after."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the models are local
    programs = prepare(".")
    python = str(programs / "python")
    run(python, "examples/make_models.py")
    shutil.rmtree(PROJECT / "out", ignore_errors=True)
    run(str(programs / "mergekit-yaml"), "examples/dare.yml", "out/")
    run(python, "examples/show_merge.py", "out/")


if __name__ == "__main__":
    main()
