"""What the header of a safetensors file says about its tensors; all headers are read here."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

# By the names that safetensors gives them: those of weights, and those of buffers, too.
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DTYPES = FLOATS | {"I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}
LARGEST = 100_000_000  # bytes of a header; the format's own limit


class DamagedFileError(ValueError):
    """A file that is not in safetensors' format, or is incomplete; the message says how."""


@dataclass(frozen=True)
class StoredTensor:
    """What a header says about a tensor.

    Attributes:
        dtype: As safetensors names it.
        shape: As torch has it.
        first: Where it begins in its file, in bytes; -1 if that is not known.

    """

    dtype: str
    shape: tuple[int, ...]
    first: int = -1


def read(file: Path) -> Mapping[str, StoredTensor]:
    """Return the tensors of a file by name; a file is read again only if it has changed.

    Raises:
        DamagedFileError: the file is damaged.
        OSError: it cannot be read.

    """
    status = file.stat()
    return _read(file, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=512)
def _read(file: Path, _changed: int, size: int) -> Mapping[str, StoredTensor]:
    try:
        with safetensors.safe_open(file, framework="pt"):  # it checks every offset
            pass
    except Exception as error:  # safetensors raises a type of its own, not OSError
        reason = " ".join(str(error).split())
        what = _size_problem(file, size) or f"is damaged: its header cannot be read ({reason})"
        raise DamagedFileError(what) from error
    header, start = _header(file, size)
    return {
        name: StoredTensor(
            entry["dtype"], tuple(entry["shape"]), start + int(entry["data_offsets"][0])
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _header(file: Path, size: int) -> tuple[dict[str, dict[str, Any]], int]:
    """Return a header, and where it ends."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > min(LARGEST, size):
            raise DamagedFileError("is damaged: its header is larger than the format allows")
        return json.loads(opened.read(length)), 8 + length


def _size_problem(file: Path, size: int) -> str | None:
    """Say that a file is truncated or too long, if its header can be read at all."""
    try:
        header, start = _header(file, size)
        ends = [int(v["data_offsets"][1]) for k, v in header.items() if k != "__metadata__"]
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError):
        return None
    whole = start + max(ends, default=0)
    if size == whole:
        return None
    what = "is truncated" if size < whole else "has extra bytes at its end"
    return f"{what}: it has {size} bytes, but its header describes {whole}"
