"""How the cost of a whole merge grows with the size and the number of models."""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tests.benchmarks.process import (
    RUNS,
    SIZES,
    Cost,
    drop_from_cache,
    folder_bytes,
    make_models,
    merge_once,
)
from tests.benchmarks.report import show

GB = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this section's options."""
    parser.add_argument("--folder", type=Path, default=Path("/tmp/mergekit-dare-growth"))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--models", type=int, nargs="+", default=[2, 3, 6])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--rounds", type=int, default=3, help="median of how many")
    parser.add_argument("--cold", action="store_true", help="read the files from the disk")


def run(arguments: argparse.Namespace) -> None:
    """Merge models of each size, print one row for each, and a line through each command's."""
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes:
        folder = arguments.folder / size
        shutil.rmtree(folder, ignore_errors=True)
        names = [f"m{k}" for k in range(max(arguments.models))]
        parameters = make_models(folder, SIZES[size], names)
        cases = [(count, name) for count in arguments.models for name in arguments.runs]
        for count, name in tqdm(cases, desc=size, file=sys.stderr):
            costs = [_merge(folder, name, names[:count], arguments.cold, first=True)]
            costs += [
                _merge(folder, name, names[:count], arguments.cold)
                for _ in range(arguments.rounds - 1)
            ]
            read = 1 if name.startswith("passthrough") else count + 1
            rows.append(
                {
                    "run": name,
                    "parameters": f"{parameters / 1e9:.2f} B",
                    "models": count,
                    "GB in and out": (read + 1) * folder_bytes(folder / "base") / GB,
                    "seconds": statistics.median(cost.seconds for cost in costs),
                    "peak anonymous MiB": statistics.median(cost.anonymous for cost in costs),
                    "MB from the disk": statistics.median(cost.read for cost in costs),
                    "MB to the disk": statistics.median(cost.written for cost in costs),
                }
            )
        shutil.rmtree(folder)
    show(rows, as_json=arguments.json)
    lines = [_line(name, [row for row in rows if row["run"] == name]) for name in arguments.runs]
    if not arguments.json and len(rows) > len(lines):
        print()
        show(lines, as_json=False)


def _merge(
    folder: Path, name: str, models: Sequence[str], cold: bool, *, first: bool = False
) -> Cost:
    if cold:
        drop_from_cache(folder)
    elif first:
        for file in folder.glob("*/*.safetensors"):
            with file.open("rb") as opened:
                while opened.read(1 << 24):
                    pass
    return merge_once(folder, *RUNS[name], models)


def _line(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the least-squares line: seconds = fixed + slope * gigabytes."""
    gigabytes = torch.tensor([[1.0, row["GB in and out"]] for row in rows], dtype=torch.float64)
    seconds = torch.tensor([[row["seconds"]] for row in rows], dtype=torch.float64)
    fixed, slope = torch.linalg.lstsq(gigabytes, seconds).solution.flatten().tolist()
    return {"run": name, "fixed seconds": fixed, "seconds per GB": slope}
