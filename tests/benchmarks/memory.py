"""Peak memory of merging one tensor, beside its inputs and its output."""

from __future__ import annotations

import argparse
import ctypes
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tests.benchmarks import candidates
from tests.benchmarks.report import show

MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this section's options."""
    parser.add_argument("--models", type=int, default=8, help="number of fine-tuned models")
    parser.add_argument("--dtype", default="bf16", choices=candidates.DTYPES)
    parser.add_argument("--elements", type=int, default=131_072_000)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")


def run(arguments: argparse.Namespace) -> None:
    """Measure every method and print one row for each."""
    dtype = candidates.DTYPES[arguments.dtype]
    inputs = candidates.tensors(arguments.models, arguments.elements, dtype, arguments.device)
    small = [tensor[: 1 << 21] for tensor in inputs]
    rows = []
    merges_small = candidates.merges(small)
    for name, merge in tqdm(candidates.merges(inputs).items(), file=sys.stderr):
        merges_small[name]()  # what is loaded and compiled once is not a part of the merge
        if arguments.device == "cpu":
            ctypes.CDLL(None).malloc_trim(0)  # what was freed must not be had for nothing
        peak = _peak_on_cpu(merge) if arguments.device == "cpu" else _peak_on_cuda(merge)
        row: dict[str, Any] = {"method": name, "elements": arguments.elements}
        row |= {"models": arguments.models, "dtype": arguments.dtype}
        rows.append(row | {"MiB beside inputs and output": peak / MIB})
    show(rows, as_json=arguments.json)


def _peak_on_cpu(merge: candidates.Merge) -> float:
    """Return the growth of the process's peak resident memory, less the output's size.

    Linux resets the peak (VmHWM) when 5 is written to clear_refs.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    (output,) = _tensors(merge())
    return _status("VmHWM") - before - output.nbytes


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}: this benchmark needs Linux")


def _peak_on_cuda(merge: candidates.Merge) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    (output,) = _tensors(merge())
    return torch.cuda.max_memory_allocated() - before - output.nbytes


def _tensors(result: object) -> tuple[Tensor, ...]:
    assert isinstance(result, tuple)
    return result
