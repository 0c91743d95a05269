"""Whole ``mergekit-yaml`` runs on checkpoints of a real size, made on the spot."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from mergekit_dare.plugin import autoload
from tests.benchmarks.candidates import DENSITY, WEIGHT
from tests.benchmarks.report import paired_ratio, show

MODELS = ["a", "b", "c"]
# Of a Llama: width, inner width, layers.
SIZES = {"0.1B": (768, 2048, 8), "0.66B": (1536, 4096, 20), "2B": (2560, 6912, 24)}
BUILT_IN = {autoload.SWITCH: "0"}
# name: method, environment
RUNS: dict[str, tuple[str, dict[str, str]]] = {
    "dare_linear": ("dare_linear", {}),
    "dare_ties": ("dare_ties", {}),
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
    parameters = make_models(folder, SIZES["0.66B"], MODELS)
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
            cost = merge_once(folder, method, environment, MODELS)
            progress.update()
            if round_number >= 0:
                seconds[name].append(cost.seconds)
                peaks[name].append(cost.peak)
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


def make_models(folder: Path, size: tuple[int, int, int], names: Sequence[str]) -> int:
    """Save a base and fine-tuned versions in bfloat16; return the number of parameters."""
    width, inner, layers = size
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    count: int = sum(parameter.numel() for parameter in model.parameters())
    for name in ["base", *names]:
        if name != "base":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += torch.randn(parameter.shape, dtype=parameter.dtype) * 0.002
        if not (folder / name / "config.json").exists():
            model.save_pretrained(folder / name)
    return count


class Cost(NamedTuple):
    """What one merge took.

    Attributes:
        seconds: Wall time of the whole process.
        peak: Peak resident memory in MiB, with the pages of mapped files.
        anonymous: The same without them.
        read: MB read from the disk.
        written: MB written to the disk.

    """

    seconds: float
    peak: float
    anonymous: float
    read: float
    written: float


def merge_config(folder: Path, method: str, names: Sequence[str]) -> dict[str, Any]:
    """Return the config that merges the models of these names."""
    models: list[dict[str, Any]] = [{"model": str(folder / name)} for name in names]
    config: dict[str, Any] = {"merge_method": method, "models": models}
    if method == "passthrough":
        del models[1:]
    else:
        config["base_model"] = str(folder / "base")
        for entry in models:
            entry["parameters"] = {"weight": WEIGHT, "density": DENSITY}
    return config


def merge_once(
    folder: Path, method: str, environment: dict[str, str], names: Sequence[str]
) -> Cost:
    """Merge the models of these names in a process of its own."""
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(merge_config(folder, method, names)))
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    process = subprocess.Popen(
        [Path(sys.executable).parent / "mergekit-yaml", path, out, "--quiet"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    anonymous = 0
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        anonymous = max(anonymous, _anonymous_bytes(process.pid))
        time.sleep(0.02)
    wall = time.perf_counter() - start
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        assert process.stderr is not None
        raise RuntimeError(process.stderr.read().decode())
    read, written = (blocks * 512 / 1e6 for blocks in (usage.ru_inblock, usage.ru_oublock))
    return Cost(wall, usage.ru_maxrss / 1024, anonymous / 2**20, read, written)


def _anonymous_bytes(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:  # not on Linux, or it has just ended
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0][1]) * 1024 if lines else 0


def folder_bytes(folder: Path) -> int:
    """Return the size of a model's weights on the disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def drop_from_cache(folder: Path) -> None:
    """Take the weights in this folder out of the operating system's cache."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
