"""The time of merging one tensor, for ours, the built-ins, task arithmetic and the floor."""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import statistics
import sys
import time
from itertools import product
from typing import Any

import torch
from tqdm import tqdm

from tests.benchmarks import candidates
from tests.benchmarks.report import paired_ratio, show

ELEMENTS = {"4k": 4096, "11.5m": 11_534_336, "131m": 131_072_000}
TYPICAL = {"models": 3, "dtype": "bf16", "elements": "11.5m"}
VARIED: dict[str, list[Any]] = {
    "models": [1, 3, 8],
    "dtype": list(candidates.DTYPES),
    "elements": list(ELEMENTS),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this section's options."""
    parser.add_argument("--grid", action="store_true", help="all combinations, not one at a time")
    parser.add_argument("--models", type=int, nargs="+", help="numbers of fine-tuned models")
    parser.add_argument("--dtype", nargs="+", choices=candidates.DTYPES)
    parser.add_argument("--elements", nargs="+", choices=ELEMENTS)
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 and all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=7, help="median of how many")
    parser.add_argument("--no-built-in", action="store_true", help="leave the slow ones out")
    parser.add_argument(
        "--new-memory",
        action="store_true",
        help="give freed memory back to the system (glibc) before each call: a merge keeps its "
        "results until a shard is full, so each lies in new memory",
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure every case and print one row for each."""
    cpu = arguments.device == "cpu"
    threads = arguments.threads or (sorted({1, torch.get_num_threads()}) if cpu else [1])
    rows = []
    for case, count in tqdm(list(product(_cases(arguments), threads)), file=sys.stderr):
        torch.set_num_threads(count)
        rows.append(case | {"threads": count} | _measure(case, arguments))
    show(rows, as_json=arguments.json)


def _cases(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    given = {key: getattr(arguments, key) for key in VARIED if getattr(arguments, key)}
    if arguments.grid or given:
        fallback = VARIED if arguments.grid else {key: [TYPICAL[key]] for key in VARIED}
        values = [given.get(key, fallback[key]) for key in VARIED]
        return [dict(zip(VARIED, combination, strict=True)) for combination in product(*values)]
    cases = [TYPICAL]
    for key, alternatives in VARIED.items():
        cases += [TYPICAL | {key: value} for value in alternatives if value != TYPICAL[key]]
    return cases


def _measure(case: dict[str, Any], arguments: argparse.Namespace) -> dict[str, float]:
    elements = ELEMENTS[case["elements"]]
    dtype = candidates.DTYPES[case["dtype"]]
    inputs = candidates.tensors(case["models"], elements, dtype, arguments.device)
    merges = {
        name: merge
        for name, merge in candidates.merges(inputs).items()
        if not (arguments.no_built_in and name.startswith("built-in"))
    }
    merges["floor"] = candidates.floor(inputs)
    merges["range watch"] = candidates.range_watch(inputs)
    times: dict[str, list[float]] = {name: [] for name in merges}
    repeat = max(1, 200_000 // elements)
    rounds = arguments.rounds if elements < 1e8 else min(3, arguments.rounds)
    for round_number in range(-1, rounds):  # one round to warm up
        # In another order each time: who comes after a large one finds no memory ready.
        order = random.Random(round_number).sample(list(merges), len(merges))
        for name, merge in ((name, merges[name]) for name in order):
            if arguments.new_memory:
                gc.collect()
                ctypes.CDLL(None).malloc_trim(0)
            start = time.perf_counter()
            for _ in range(repeat):
                merge()
            if arguments.device != "cpu":
                torch.cuda.synchronize()
            if round_number >= 0:
                times[name].append((time.perf_counter() - start) / repeat)
    scale = 1e9 / (elements * case["models"])
    row: dict[str, float] = {
        f"{name} ns": statistics.median(values) * scale for name, values in times.items()
    }
    for method in ("linear", "ties"):
        name = f"dare_{method}"
        ours = times[name]
        for way in candidates.WAYS:
            row[f"{name} {way} / plain"] = paired_ratio(times[f"{name} {way}"], ours)
        if f"built-in {method}" in times:
            row[f"built-in / {name}"] = paired_ratio(times[f"built-in {method}"], ours)
        row[f"{name} / task_arithmetic"] = paired_ratio(ours, times["task_arithmetic"])
        row[f"{name} / floor"] = paired_ratio(ours, times["floor"])
        row[f"range watch / {name}"] = paired_ratio(times["range watch"], ours)
    return row
