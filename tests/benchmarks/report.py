"""What all benchmarks print: the machine, and tables of medians and paired ratios."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mergekit  # noqa: F401
import torch

from mergekit_dare import __version__


def machine() -> dict[str, str | int]:
    """Name the machine and the versions."""
    from importlib.metadata import version

    facts: dict[str, str | int] = {
        "processor": _processor(),
        "cores": torch.get_num_threads(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mergekit": version("mergekit"),
        "mergekit-dare": __version__,
    }
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def paired_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of times[i] / others[i]: both were taken in round i, side by side."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def show(rows: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """Print the machine and the rows, which have the same keys, as Markdown or JSON."""
    if as_json:
        print(json.dumps({"machine": machine(), "rows": list(rows)}, indent=1))
        return
    print(", ".join(f"{key} {value}" for key, value in machine().items()), end="\n\n")
    keys = list(rows[0])
    cells = [keys, *([_cell(row[key]) for key in keys] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(keys))]
    for number, line in enumerate(cells):
        padded = (text.rjust(width) for text, width in zip(line, widths, strict=True))
        print("| " + " | ".join(padded) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
