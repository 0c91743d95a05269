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
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> None:
    """Measure fresh processes: without compiled code, with an empty cache, and with it again."""
    if arguments.child:
        method, start = arguments.child
        print(json.dumps(_in_this_process(method, start, arguments.models)))
        return
    starts: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in tqdm(range(arguments.rounds), file=sys.stderr):
        for method in ("dare_linear", "dare_ties"):
            with tempfile.TemporaryDirectory() as cache:
                for start in ("not used", "made", "loaded"):
                    figures = _in_a_fresh_process(method, start, arguments.models, cache)
                    starts.setdefault((method, start), []).append(figures)
    medians = {
        of: {key: statistics.median(each[key] for each in measured) for key in measured[0]}
        for of, measured in starts.items()
    }
    rows: list[dict[str, Any]] = []
    for (method, start), figures in medians.items():
        plain = medians[method, "not used"]
        row: dict[str, Any] = {"method": method, "models": arguments.models, "dtype": DTYPE}
        row |= {"compiled code is": start, "seconds at first": figures["at first"]}
        row["ns"] = figures["later"] * 1e9
        pays: float | str = ""
        if start != "not used":
            lost = max(0.0, figures["at first"] - plain["at first"])
            pays = lost / (plain["later"] - figures["later"]) / 1e6
        rows.append(row | {"pays from million elements x models": pays})
    show(rows, as_json=arguments.json)


def _in_a_fresh_process(method: str, start: str, models: int, cache: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks", "startup"]
    command += ["--child", method, start, "--models", str(models)]
    environment = os.environ | {packages.FOLDER: cache}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _in_this_process(method: str, start: str, models: int) -> dict[str, float]:
    """Return the seconds that the first merge takes longer, and those for an element and model."""
    inputs = candidates.tensors(models, ELEMENTS, candidates.DTYPES[DTYPE], "cpu")
    switch = "0" if start == "not used" else "1"
    merge = candidates.merge_with(switch, candidates.merge(candidates.methods()[method], inputs))
    first = time.perf_counter()
    merge()
    first = time.perf_counter() - first
    if any(package.code is None for package in compiled._LOADED.values()):
        raise RuntimeError("there is no compiled code here")
    later = _seconds(merge)
    return {"at first": first - later, "later": later / (ELEMENTS * models)}


def _seconds(merge: candidates.Merge) -> float:
    times = []
    for _ in range(8):
        start = time.perf_counter()
        merge()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
