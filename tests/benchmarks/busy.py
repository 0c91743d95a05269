"""The time of merging one tensor while other processes want the cores, too."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from tests.benchmarks import candidates
from tests.benchmarks.kernel import ELEMENTS
from tests.benchmarks.report import show

MEASURED = (
    "dare_linear",
    "dare_ties",
    "task_arithmetic",
    "built-in linear",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this section's options."""
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="other processes")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--elements", choices=ELEMENTS, default="11.5m")
    parser.add_argument("--rounds", type=int, default=7, help="median of how many")


def run(arguments: argparse.Namespace) -> None:
    """Measure all methods beside each number of processes, with all threads and with one."""
    elements, threads = ELEMENTS[arguments.elements], torch.get_num_threads()
    inputs = candidates.tensors(arguments.models, elements, torch.bfloat16, "cpu")
    merges = {name: candidates.merges(inputs)[name] for name in MEASURED}
    scale = 1e9 / (elements * arguments.models)
    rows, alone_by_one = [], {}
    for busy in tqdm(arguments.busy, file=sys.stderr):
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            with _busy(busy):
                times = _times(merges, arguments.rounds)
            row: dict[str, Any] = {"busy processes": busy, "threads": count}
            row |= {f"{name} ns": value * scale for name, value in times.items()}
            if count == 1 and busy == min(arguments.busy):
                alone_by_one = times
            for name in ("dare_linear", "dare_ties"):
                key = f"{name} / by one thread beside {min(arguments.busy)}"
                row[key] = times[name] / alone_by_one[name]
            rows.append(row)
    torch.set_num_threads(threads)
    show(rows, as_json=arguments.json)


@contextmanager
def _busy(count: int) -> Iterator[None]:
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(count)]
    time.sleep(0.5)
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def _times(merges: dict[str, candidates.Merge], rounds: int) -> dict[str, float]:
    """Return the median time of each, in seconds; the first round only warms up."""
    times: dict[str, list[float]] = {name: [] for name in merges}
    for _ in range(rounds + 1):
        for name, merge in merges.items():
            start = time.perf_counter()
            merge()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}
