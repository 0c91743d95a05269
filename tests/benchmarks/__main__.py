"""``python -m tests.benchmarks SECTION [OPTIONS]``."""

from __future__ import annotations

import argparse
import importlib

SECTIONS = {
    "kernel": "time of merging one tensor",
    "busy": "the same while other processes want the cores, too",
    "startup": "the first merge of a machine, of a process, and those after it",
    "memory": "peak memory of merging one tensor, beside inputs and output",
    "inspecting": "mergekit-dare inspect: a sample, and all weights",
    "process": "wall time and peak memory of whole mergekit-yaml runs",
    "stages": "where the time of a whole run goes, with options of mergekit",
    "small": "merges of very many small tensors",
    "growth": "how the cost of whole runs grows with size and number of models",
}


def main() -> None:
    """Run one section and print its tables, or all figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    sections = parser.add_subparsers(required=True, metavar="SECTION")
    for name, description in SECTIONS.items():
        section = sections.add_parser(name, help=description, description=description)
        section.add_argument("--json", action="store_true", help="print JSON instead of tables")
        module = importlib.import_module(f"tests.benchmarks.{name}")
        module.add_arguments(section)
        section.set_defaults(run=module.run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
