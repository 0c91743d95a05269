"""Excerpts of tensors: evenly spread, the same in every run, without reading the whole file.

An excerpt consists of blocks. A tensor is divided into equal stretches, one for each block, and the
multiples of the golden ratio place the blocks within them, so that they do not fall on the same
columns of every row. From safetensors, only the pages of those blocks are read, by a memory map.
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
from mergekit_dare.plugin.headers import FLOATS, StoredTensor

# From each tensor: this share of its elements, but at least LEAST if it has that many.
SHARE = 1 / 128
LEAST = 1 << 16
# Elements in a block: in bfloat16, a page of a file.
BLOCK = 2048
_GOLDEN = (math.sqrt(5) - 1) / 2


def starts(count: int, ahead: int = 0) -> list[int] | None:
    """Return where the blocks of a tensor begin; ``None`` for all of it.

    Args:
        count: Its number of elements.
        ahead: How many elements of its first page precede it in the file: blocks begin at pages,
            so that no more pages are read than necessary.

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
        values: What :func:`excerpt` returns.
        shape: The shape of the whole tensor.

    """

    values: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Excerpt:
        """Take an excerpt of a tensor that is in memory."""
        return cls(excerpt(tensor.detach()), tuple(tensor.shape))


@dataclass
class Bytes:
    """How many bytes the tensors have, and how many of them were read, in whole pages."""

    there: int = 0
    read: int = 0

    @property
    def share(self) -> float:
        """The fraction that was read."""
        return self.read / self.there if self.there else 1.0


@dataclass
class ExcerptReader:
    """Reads excerpts of the tensors that mergekit would load; used by one thread.

    Attributes:
        bytes: What has been read so far.

    """

    bytes: Bytes = field(default_factory=Bytes)
    _mapped: dict[Path, _MappedFile] = field(default_factory=dict)

    def read(self, gather: GatherTensors) -> dict[object, Excerpt] | None:
        """Return excerpts of what a task would load, by model.

        ``None`` if one of the tensors has no excerpt: it is pickled, or is not stored under any of
        its names, so that mergekit may convert it from others.
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
            # The same elements of all models, whose files mostly have the same layout.
            values = stored.read(parts[0][1].ahead, self.bytes)
            dtype = dtype_from_name(load.dtype) or values.dtype
            found[load.model] = Excerpt(values.to(dtype), stored.shape)
        return found

    def count_whole(self, tensors: dict[object, Tensor]) -> None:
        """Note that tensors were read completely."""
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
        vector: Its elements, none of which has been read.
        shape: Its shape.
        first: Where it begins in the file, in bytes.

    """

    vector: Tensor
    shape: tuple[int, ...]
    first: int

    @property
    def ahead(self) -> int:
        """How many elements of the page that it begins in precede it."""
        return self.first % mmap.PAGESIZE // self.vector.element_size()

    def read(self, ahead: int, read: Bytes) -> Tensor:
        """Return a copy of its excerpt, and count what is read, in whole pages."""
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
        if stored is None or stored.dtype not in FLOATS:
            return None
        dtype, count = FLOATS[stored.dtype], math.prod(stored.shape)
        if count == 0 or stored.first % dtype.itemsize:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a read-only buffer: nothing is written
            vector = torch.frombuffer(self.content, dtype=dtype, count=count, offset=stored.first)
        return _MappedTensor(vector, stored.shape, stored.first)
