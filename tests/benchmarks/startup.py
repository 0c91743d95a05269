"""What compiled code takes to make and to load, and the size of merge from which that pays."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from tqdm import tqdm

from mergekit_dare.kernel import compiled, packages
from tests.benchmarks import candidates
from tests.benchmarks.report import show

ELEMENTS, DTYPE = 11_534_336, "bf16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this section's options."""
    parser.add_argument("--models", type=int, default=3, help="number of fine-tuned models")
    parser.add_argument("--rounds", type=int, default=3, help="median of how many")
    parser.add_argument("--child", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> None:
    """Measure fresh processes, with an empty cache and with that cache again."""
    if arguments.child:
        print(json.dumps(_in_this_process(arguments.child, arguments.models)))
        return
    starts: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in tqdm(range(arguments.rounds), file=sys.stderr):
        for method in ("dare_linear", "dare_ties"):
            with tempfile.TemporaryDirectory() as cache:
                for start in ("made", "loaded"):
                    figures = _in_a_fresh_process(method, arguments.models, cache)
                    starts.setdefault((method, start), []).append(figures)
    rows: list[dict[str, Any]] = []
    for (method, start), measured in starts.items():
        seconds, plain, with_compiled = (
            statistics.median(each[key] for each in measured)
            for key in ("seconds", "plain", "compiled")
        )
        row: dict[str, Any] = {"method": method, "models": arguments.models, "dtype": DTYPE}
        row |= {"package is": start, "seconds at first": seconds}
        row |= {"ns": plain * 1e9, "compiled ns": with_compiled * 1e9}
        row["pays from million elements x models"] = seconds / (plain - with_compiled) / 1e6
        rows.append(row)
    show(rows, as_json=arguments.json)


def _in_a_fresh_process(method: str, models: int, cache: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks", "startup"]
    command += ["--child", method, "--models", str(models)]
    environment = os.environ | {packages.FOLDER: cache}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _in_this_process(method: str, models: int) -> dict[str, float]:
    """Return the seconds that the first merge takes longer, and those for an element and model."""
    inputs = candidates.tensors(models, ELEMENTS, candidates.DTYPES[DTYPE], "cpu")
    merge = candidates.merge(candidates.methods()[method], inputs)
    plain = _seconds(candidates.merge_with("0", merge))
    with_packages = candidates.merge_with("1", merge)
    first = time.perf_counter()
    with_packages()
    first = time.perf_counter() - first
    if None in compiled._LOADED.values():
        raise RuntimeError("there is no compiled code here")
    with_compiled = _seconds(with_packages)
    scale = 1 / (ELEMENTS * models)
    figures = {"plain": plain * scale, "compiled": with_compiled * scale}
    return figures | {"seconds": first - with_compiled}


def _seconds(merge: candidates.Merge) -> float:
    times = []
    for _ in range(8):
        start = time.perf_counter()
        merge()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
