"""``mergekit-dare inspect`` on checkpoints of a real size: a sample beside all of it."""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import yaml
from mergekit.options import MergeOptions

from mergekit_dare.diagnostics.deltas import inspection
from tests.benchmarks.process import MODELS, SIZES, drop_from_cache, make_models
from tests.benchmarks.report import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this section's options."""
    parser.add_argument("--folder", type=Path, default=Path("/tmp/mergekit-dare-benchmark"))
    parser.add_argument("--rounds", type=int, default=3, help="median of how many")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints (6 GB)")


def run(arguments: argparse.Namespace) -> None:
    """Make the checkpoints, inspect them in turn, and print one row for each way.

    Imports come before the clock. Bytes are those that were read from the disk with cold files.
    """
    folder: Path = arguments.folder
    parameters = make_models(folder, SIZES["0.66B"], MODELS)
    models = [
        {"model": str(folder / name), "parameters": {"weight": 0.3, "density": 0.1}}
        for name in MODELS
    ]
    config = {"merge_method": "dare_ties", "base_model": str(folder / "base"), "models": models}
    path = folder / "inspect.yml"
    path.write_text(yaml.safe_dump(config))
    rows: list[dict[str, Any]] = []
    for name, full in (("sample", False), ("--full", True)):
        drop_from_cache(folder)
        cold = _inspect(path, full=full)
        warm = [_inspect(path, full=full) for _ in range(arguments.rounds)]
        rows.append(
            {
                "inspect": name,
                "parameters": f"4 x {parameters / 1e9:.2f} B",
                "seconds, warm files": statistics.median(seconds for seconds, _ in warm),
                "seconds, cold files": cold[0],
                "read from the disk, MB": cold[1] / 1e6,
            }
        )
    show(rows, as_json=arguments.json)
    if not arguments.keep:
        shutil.rmtree(folder)


def _inspect(path: Path, *, full: bool) -> tuple[float, int]:
    """Return seconds, and the bytes that came from the disk."""
    start, read = time.perf_counter(), _read_bytes()
    inspection.inspect_config(str(path), MergeOptions(quiet=True), full=full)
    return time.perf_counter() - start, _read_bytes() - read


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))
