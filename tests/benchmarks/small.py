"""Merges of very many small tensors, in this process: what the methods take of them."""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import MergeMethod
from mergekit.options import MergeOptions
from tqdm import tqdm

from tests.benchmarks.process import MODELS, RUNS, make_models, merge_config
from tests.benchmarks.report import show

# Of a Llama: so all its matrices have 4,096 elements, but for the first and the last.
WIDTH, LAYERS, TENSORS_IN_LAYER = 64, [50, 100, 200], 9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this section's options."""
    parser.add_argument("--folder", type=Path, default=Path("/tmp/mergekit-dare-small"))
    parser.add_argument("--layers", type=int, nargs="+", default=LAYERS)
    parser.add_argument("--rounds", type=int, default=3, help="median of how many")


def run(arguments: argparse.Namespace) -> None:
    """Merge models with more and more layers, and print one row for each of the runs."""
    names = [name for name in RUNS if not name.startswith("built-in")]
    rows: list[dict[str, Any]] = []
    for layers in arguments.layers:
        folder = arguments.folder / str(layers)
        shutil.rmtree(folder, ignore_errors=True)
        make_models(folder, (WIDTH, WIDTH, layers), MODELS)
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for _ in tqdm(range(arguments.rounds), desc=f"{layers} layers", file=sys.stderr):
            for name in names:
                measured[name].append(_merge(folder, name))
        tensors = layers * TENSORS_IN_LAYER + 3
        for name, times in measured.items():
            whole, of_method = (statistics.median(column) for column in zip(*times, strict=True))
            row: dict[str, Any] = {"run": name, "tensors": tensors, "seconds": whole}
            row["ms per tensor"] = whole / tensors * 1e3
            row["of it in the method"] = of_method / tensors * 1e3
            rows.append(row)
        shutil.rmtree(folder)
    show(rows, as_json=arguments.json)


def _merge(folder: Path, name: str) -> tuple[float, float]:
    """Return the seconds of a merge, and of those the method's."""
    method, _ = RUNS[name]
    config = MergeConfiguration.model_validate(merge_config(folder, method, MODELS))
    seconds, execute = 0.0, MergeMethod._execute_resolved

    def timed(self: MergeMethod, *given: Any, **more: Any) -> Any:
        nonlocal seconds
        start = time.perf_counter()
        result = execute(self, *given, **more)
        seconds += time.perf_counter() - start
        return result

    options = MergeOptions(quiet=True, copy_tokenizer=False)
    with mock.patch.object(MergeMethod, "_execute_resolved", timed):
        start = time.perf_counter()
        run_merge(config, str(folder / "out"), options)
        return time.perf_counter() - start, seconds
