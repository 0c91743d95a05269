"""``python -m mergekit_dare COMMAND ...``: run a mergekit command with our methods in place.

For installations where Python's start-up files do not run, such as a folder on ``PYTHONPATH``
or one that ``pip install --target`` filled.
"""

from __future__ import annotations

import importlib
import sys

import mergekit_dare

COMMANDS = {
    "yaml": "mergekit.scripts.run_yaml",
    "multi": "mergekit.scripts.multimerge",
    "pytorch": "mergekit.scripts.merge_raw_pytorch",
}


def main(arguments: list[str]) -> int:
    """Run ``mergekit-COMMAND`` with the remaining arguments; return the exit code."""
    if not arguments or arguments[0] not in COMMANDS:
        print(
            f"usage: python -m mergekit_dare {{{','.join(COMMANDS)}}} ARGUMENTS...\n"
            "Run mergekit-yaml, mergekit-multi or mergekit-pytorch with mergekit-dare's "
            "dare_linear and dare_ties.",
            file=sys.stderr,
        )
        return 2
    command, *rest = arguments
    mergekit_dare.register()
    script = importlib.import_module(COMMANDS[command])
    script.main(args=rest, prog_name=f"python -m mergekit_dare {command}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
