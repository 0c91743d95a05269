"""The first merge of a machine, that of a process, and those after it: Numba compiles, or loads."""

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

import torch
from tqdm import tqdm

from tests.benchmarks import candidates
from tests.benchmarks.report import show

ELEMENTS = 11_534_336
STARTS = ("of the machine", "of a later process")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this section's options."""
    parser.add_argument("--models", type=int, default=3, help="number of fine-tuned models")
    parser.add_argument("--rounds", type=int, default=3, help="median of how many")
    parser.add_argument("--child", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> None:
    """Measure fresh processes, with an empty cache of Numba and with it again."""
    if arguments.child:
        print(json.dumps(_in_this_process(arguments.child, arguments.models)))
        return
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in tqdm(range(arguments.rounds), file=sys.stderr):
        for method in ("dare_linear", "dare_ties"):
            with tempfile.TemporaryDirectory() as cache:
                for start in STARTS:
                    figures = _in_a_fresh_process(method, arguments.models, cache)
                    found.setdefault((method, start), []).append(figures)
    rows: list[dict[str, Any]] = [
        {"method": method, "first merge": start}
        | {f"{key} s": statistics.median(each[key] for each in measured) for key in measured[0]}
        for (method, start), measured in found.items()
    ]
    show(rows, as_json=arguments.json)


def _in_a_fresh_process(method: str, models: int, cache: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks", "startup"]
    command += ["--child", method, "--models", str(models)]
    environment = os.environ | {"NUMBA_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _in_this_process(method: str, models: int) -> dict[str, float]:
    """Return the seconds of the first merge, and of those after it."""
    inputs = candidates.tensors(models, ELEMENTS, torch.bfloat16, "cpu")
    merge = candidates.merge(candidates.methods()[method], inputs)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        merge()
        times.append(time.perf_counter() - start)
    return {"first": times[0], "later": statistics.median(times[1:])}
