"""``python -m mergekit_dare COMMAND ...``: a command of ours, or mergekit's with our methods.

For installations where Python's start-up files do not run, such as a folder on ``PYTHONPATH`` or
one that ``pip install --target`` filled, and for those whose programs are not on the PATH.
"""

from __future__ import annotations

import importlib
import sys

import mergekit_dare
from mergekit_dare import cli

PROGRAM = "python -m mergekit_dare"
MERGEKIT_COMMANDS = {
    "yaml": "mergekit.scripts.run_yaml",
    "multi": "mergekit.scripts.multimerge",
    "pytorch": "mergekit.scripts.merge_raw_pytorch",
}


def main(arguments: list[str]) -> int:
    """Run a command with the arguments that follow its name; return or exit with its exit code."""
    first, *rest = arguments or [""]
    if first in MERGEKIT_COMMANDS:
        mergekit_dare.register()
        script = importlib.import_module(MERGEKIT_COMMANDS[first])
        script.main(args=rest, prog_name=f"{PROGRAM} {first}")
    elif first in cli.COMMANDS or first == "--version":
        cli.main(args=arguments, prog_name=PROGRAM)
    else:
        asked = first in ("-h", "--help")
        print(_usage(), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    return 0


def _usage() -> str:
    return (
        f"usage: {PROGRAM} COMMAND ARGUMENTS...\n"
        f"  {', '.join(MERGEKIT_COMMANDS)}: mergekit-yaml, mergekit-multi, mergekit-pytorch, "
        "with mergekit-dare's dare_linear and dare_ties\n"
        f"  {', '.join(cli.COMMANDS)}: those of mergekit-dare"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
