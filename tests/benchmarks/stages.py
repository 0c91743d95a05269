"""Where the time of a whole merge goes: one process, stage by stage."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from tqdm import tqdm

from tests.benchmarks.process import MODELS, SIZES, make_models, merge_config
from tests.benchmarks.report import show

ALWAYS = ("--quiet", "--no-copy-tokenizer")  # these models have none
OPTIONS: dict[str, list[str]] = {
    "as it is": [],
    "--async-write": ["--async-write"],
    "--out-shard-size 200M": ["--out-shard-size", "200M"],
    "both": ["--async-write", "--out-shard-size", "200M"],
    "-j 1": ["-j", "1"],
}
# mergekit's tasks by what they do; its other tasks take microseconds.
STAGES = {
    "LoadTensor": "reading",
    "GatherTensors": "reading",
    "ExecuteMergeMethodTask": "merging",
    "TensorWriterTask": "writing",
    "SaveTensor": "writing",
    "FinalizeModel": "writing",
}
CHILD = "import time; start = time.perf_counter(); "
CHILD += "from tests.benchmarks import stages; stages.measure(start)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this section's options."""
    parser.add_argument("--folder", type=Path, default=Path("/tmp/mergekit-dare-stages"))
    parser.add_argument("--size", choices=SIZES, default="0.66B")
    parser.add_argument(
        "--methods", nargs="+", default=["dare_linear", "dare_ties", "task_arithmetic"]
    )
    parser.add_argument("--rounds", type=int, default=3, help="median of how many")


def run(arguments: argparse.Namespace) -> None:
    """Make the checkpoints, merge them in turn with each option, print a row for each."""
    folder: Path = arguments.folder
    make_models(folder, SIZES[arguments.size], MODELS)
    cases = [(method, option) for method in arguments.methods for option in OPTIONS]
    found: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in cases}
    rounds = [case for _ in range(arguments.rounds + 1) for case in cases]
    for case in tqdm(rounds, file=sys.stderr):
        found[case].append(_merge(folder, *case))
    rows: list[dict[str, Any]] = []
    for (method, option), times in found.items():
        after_first = times[1:]  # that one warms up
        medians = {
            stage: statistics.median(each[stage] for each in after_first) for stage in times[0]
        }
        rows.append({"method": method, "options": option, **medians})
    show(rows, as_json=arguments.json)
    shutil.rmtree(folder)


def _merge(folder: Path, method: str, option: str) -> dict[str, float]:
    config, out = folder / "config.yml", folder / "out"
    config.write_text(yaml.safe_dump(merge_config(folder, method, MODELS)))
    shutil.rmtree(out, ignore_errors=True)
    os.sync()  # the last one's pages are not written at this one's cost
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", CHILD, config, out, *ALWAYS, *OPTIONS[option]],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        check=True,
    )
    seconds = time.perf_counter() - start
    stages: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return {**stages, "rest": seconds - sum(stages.values()), "seconds": seconds}


def measure(start: float) -> None:
    """Run ``mergekit-yaml`` with this process's arguments; print the seconds of each stage."""
    from mergekit import graph
    from mergekit.io import tasks
    from mergekit.merge_methods import task_adapter
    from mergekit.scripts import run_yaml

    seconds = {"imports": time.perf_counter() - start}
    seconds |= dict.fromkeys(("planning", "reading", "merging", "writing"), 0.0)
    for module in (tasks, task_adapter):
        for name, stage in STAGES.items():
            task = getattr(module, name, None)
            if task is not None:
                task.execute = _timed(task.execute, stage, seconds, name == "LoadTensor")
    schedule, begun = graph.Executor.__init__, time.perf_counter()

    def planned(self: graph.Executor, *arguments: Any, **named: Any) -> None:
        schedule(self, *arguments, **named)
        seconds["planning"] = time.perf_counter() - begun

    with mock.patch.object(graph.Executor, "__init__", planned):
        run_yaml.main(standalone_mode=False)
    print(json.dumps(seconds))


def _timed(
    execute: Callable[..., Any], stage: str, seconds: dict[str, float], loads: bool
) -> Callable[..., Any]:
    def timed(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = execute(*arguments, **named)
        if loads and result is not None:
            _touch(result)
        seconds[stage] += time.perf_counter() - start
        return result

    return timed


def _touch(tensor: torch.Tensor) -> None:
    """Read a byte of each page: files are mapped, and the merge would wait for them otherwise."""
    tensor.reshape(-1).view(torch.uint8)[::4096].max()
