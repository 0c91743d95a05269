"""Whole ``mergekit-yaml`` runs on checkpoints of a real size, made on the spot."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_dare.kernel import compiled
from mergekit_dare.plugin import autoload
from tests.benchmarks.candidates import DENSITY, WEIGHT
from tests.benchmarks.report import paired_ratio, show

MODELS = ["a", "b", "c"]
COMPILED, BUILT_IN = {compiled.SWITCH: "1"}, {autoload.SWITCH: "0"}
# name: method, environment
RUNS: dict[str, tuple[str, dict[str, str]]] = {
    "dare_linear": ("dare_linear", {}),
    "dare_ties": ("dare_ties", {}),
    "compiled linear": ("dare_linear", COMPILED),
    "compiled ties": ("dare_ties", COMPILED),
    "built-in linear": ("dare_linear", BUILT_IN),
    "built-in ties": ("dare_ties", BUILT_IN),
    "task_arithmetic": ("task_arithmetic", {}),
    "passthrough (I/O only)": ("passthrough", {}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this section's options."""
    parser.add_argument("--folder", type=Path, default=Path("/tmp/mergekit-dare-benchmark"))
    parser.add_argument("--rounds", type=int, default=3, help="median of how many")
    parser.add_argument("--no-built-in", action="store_true", help="leave the slow ones out")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints (6 GB)")


def run(arguments: argparse.Namespace) -> None:
    """Make the checkpoints, run all commands in turn, and print one row for each."""
    folder: Path = arguments.folder
    parameters = make_models(folder)
    runs = {
        name: run
        for name, run in RUNS.items()
        if not (arguments.no_built_in and name.startswith("built-in"))
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, list[float]] = {name: [] for name in runs}
    progress = tqdm(total=(arguments.rounds + 1) * len(runs), file=sys.stderr)
    for round_number in range(-1, arguments.rounds):  # one round to warm up
        for name, (method, environment) in runs.items():
            if round_number < 0 and name.startswith("built-in"):
                continue
            wall, peak = _merge(folder, method, environment)
            progress.update()
            if round_number >= 0:
                seconds[name].append(wall)
                peaks[name].append(peak)
    progress.close()
    rows: list[dict[str, Any]] = [
        {
            "run": name,
            "parameters": f"{parameters / 1e9:.2f} B",
            "seconds": statistics.median(seconds[name]),
            "peak MiB": statistics.median(peaks[name]),
            "time / task_arithmetic": paired_ratio(seconds[name], seconds["task_arithmetic"]),
            "peak / task_arithmetic": paired_ratio(peaks[name], peaks["task_arithmetic"]),
        }
        for name in runs
    ]
    show(rows, as_json=arguments.json)
    if not arguments.keep:
        shutil.rmtree(folder)


def make_models(folder: Path) -> int:
    """Save a base and three fine-tuned versions in bfloat16; return the number of parameters."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    count: int = sum(parameter.numel() for parameter in model.parameters())
    for name in ["base", *MODELS]:
        if name != "base":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += torch.randn(parameter.shape, dtype=parameter.dtype) * 0.002
        if not (folder / name / "config.json").exists():
            model.save_pretrained(folder / name)
    return count


def _merge(folder: Path, method: str, environment: dict[str, str]) -> tuple[float, float]:
    """Run one merge; return its wall time in seconds and its peak resident memory in MiB."""
    models: list[dict[str, Any]] = [{"model": str(folder / name)} for name in MODELS]
    config: dict[str, Any] = {"merge_method": method, "models": models}
    if method == "passthrough":
        del models[1:]
    else:
        config["base_model"] = str(folder / "base")
        for entry in models:
            entry["parameters"] = {"weight": WEIGHT, "density": DENSITY}
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(config))
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    process = subprocess.Popen(
        [Path(sys.executable).parent / "mergekit-yaml", path, out, "--quiet"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status != 0:
        assert process.stderr is not None
        raise RuntimeError(process.stderr.read().decode())
    return wall, usage.ru_maxrss / 1024
