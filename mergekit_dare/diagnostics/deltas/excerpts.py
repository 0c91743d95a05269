"""Excerpts of tensors: evenly spread, the same in every run, read without the rest of the file.

An excerpt is made of blocks, one in each of as many equal stretches of a tensor, at a place that
the multiples of the golden ratio give, so that blocks do not fall on the same columns of every row.
Of safetensors only the pages of those blocks are read, through a memory map.
"""

from __future__ import annotations

import math
import mmap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mergekit.common import dtype_from_name
from mergekit.io.tasks import GatherTensors, LoaderCache, LoadTensor
from torch import Tensor

from mergekit_dare.plugin import headers
from mergekit_dare.plugin.headers import StoredTensor

# Of each tensor: this share of its elements, but never fewer than LEAST if it has them.
SHARE = 1 / 128
LEAST = 1 << 16
# Elements of a block: a page of a file in bfloat16.
BLOCK = 2048
_GOLDEN = (math.sqrt(5) - 1) / 2

# As safetensors names them; others have no deltas.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def starts(count: int, ahead: int = 0) -> list[int] | None:
    """Return where the blocks of a tensor begin; ``None`` for all of it.

    Args:
        count: Its number of elements.
        ahead: How many elements a page of the file holds before its first one: blocks begin with
            a page, so that no more pages are read than need be.

    """
    blocks = math.ceil(max(LEAST, count * SHARE) / BLOCK)
    stretch = count // blocks
    if stretch < 2 * BLOCK:  # more than half of it
        return None
    places = [i * stretch + int(i * _GOLDEN % 1 * (stretch - BLOCK)) for i in range(blocks)]
    return [max(0, (place + ahead) // BLOCK * BLOCK - ahead) for place in places]


def excerpt(tensor: Tensor, ahead: int = 0) -> Tensor:
    """Return the blocks of a tensor in row order, shape (blocks, BLOCK), or the tensor itself."""
    places = starts(tensor.numel(), ahead)
    if places is None:
        return tensor
    vector = tensor.reshape(-1)
    return torch.stack([vector[place : place + BLOCK] for place in places])


@dataclass(frozen=True)
class Excerpt:
    """An excerpt of a tensor.

    Attributes:
        values: Of :func:`excerpt`.
        shape: The tensor's.

    """

    values: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Excerpt:
        """Take an excerpt of a tensor that is in memory."""
        return cls(excerpt(tensor.detach()), tuple(tensor.shape))


@dataclass
class Bytes:
    """How many bytes of tensors there are, and how many of them were read: whole pages."""

    there: int = 0
    read: int = 0

    @property
    def share(self) -> float:
        """Fraction that was read."""
        return self.read / self.there if self.there else 1.0


@dataclass
class ExcerptReader:
    """Reads excerpts of the tensors that mergekit would load; used by one thread.

    Attributes:
        bytes: What was read so far.

    """

    bytes: Bytes = field(default_factory=Bytes)
    _mapped: dict[Path, _MappedFile] = field(default_factory=dict)

    def read(self, gather: GatherTensors) -> dict[object, Excerpt] | None:
        """Return excerpts of what a task would load, by model.

        ``None`` if there is none of one of them: it is pickled, or not there under any name, so
        that mergekit may make it of others.
        """
        found: dict[object, Excerpt] = {}
        parts: list[tuple[LoadTensor, _MappedTensor]] = []
        for load in gather.arguments().values():
            assert isinstance(load, LoadTensor)
            loader = LoaderCache().get(load.model)
            name = load._resolve_name(loader)
            if name is None or not loader.index.is_safetensors:
                return None
            file = Path(loader.index.base_path) / loader.index.tensor_paths[name]
            stored = self._mapped_file(file).find(name)
            if stored is None:
                return None
            parts.append((load, stored))
        for load, stored in parts:
            # The same elements of all models, whose files have most often the same layout.
            values = stored.read(parts[0][1].ahead, self.bytes)
            dtype = dtype_from_name(load.dtype) or values.dtype
            found[load.model] = Excerpt(values.to(dtype), stored.shape)
        return found

    def count_whole(self, tensors: dict[object, Tensor]) -> None:
        """Note that tensors were read as a whole."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self.bytes.there += size
        self.bytes.read += size

    def _mapped_file(self, file: Path) -> _MappedFile:
        if file not in self._mapped:
            self._mapped[file] = _MappedFile.open(file)
        return self._mapped[file]


@dataclass(frozen=True)
class _MappedTensor:
    """A tensor in a mapped file.

    Attributes:
        vector: Its elements, of which none was read.
        shape: Its shape.
        first: Where it begins in the file, in bytes.

    """

    vector: Tensor
    shape: tuple[int, ...]
    first: int

    @property
    def ahead(self) -> int:
        """How many elements the page that it begins in could hold before it."""
        return self.first % mmap.PAGESIZE // self.vector.element_size()

    def read(self, ahead: int, read: Bytes) -> Tensor:
        """Return a copy of its excerpt, and count what is read: whole pages."""
        size, count = self.vector.element_size(), self.vector.numel()
        read.there += count * size
        places = starts(count, ahead)
        for place, length in [(0, count)] if places is None else [(p, BLOCK) for p in places]:
            begin, end = self.first + place * size, self.first + (place + length) * size
            pages = -(-end // mmap.PAGESIZE) - begin // mmap.PAGESIZE
            read.read += min(pages * mmap.PAGESIZE, count * size)
        return excerpt(self.vector.reshape(self.shape), ahead).clone()


@dataclass(frozen=True)
class _MappedFile:
    """A file in safetensors' format, mapped into memory; nothing is read ahead."""

    content: mmap.mmap
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, file: Path) -> _MappedFile:
        """Map a file.

        Raises:
            DamagedFileError: its header cannot be read.

        """
        tensors = headers.read(file)
        with file.open("rb") as opened:
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            content.madvise(mmap.MADV_RANDOM)
        return cls(content, tensors)

    def find(self, name: str) -> _MappedTensor | None:
        """Return a tensor; ``None`` if it has no deltas, or cannot be mapped."""
        stored = self.tensors.get(name)
        if stored is None or stored.dtype not in DTYPES:
            return None
        dtype, count = DTYPES[stored.dtype], math.prod(stored.shape)
        if count == 0 or stored.first % dtype.itemsize:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it cannot be written to: nobody does
            vector = torch.frombuffer(self.content, dtype=dtype, count=count, offset=stored.first)
        return _MappedTensor(vector, stored.shape, stored.first)
