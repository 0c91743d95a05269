"""The fixed amount of memory in which tensors of any size are merged, chunk by chunk."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergekit_dare.kernel.masks import MaskBuffers

# Elements in a chunk. A smaller one wastes time on calls (and torch gives a core no fewer than
# 2**15 words of the mask, which are 2**17 elements), a larger one does not stay in a core's own
# cache. An accelerator needs enough elements to be busy. The largest chunk takes 40 MB of buffers
# on a CPU, 170 MB on an accelerator.
CPU_CHUNK_PER_THREAD, LARGEST_CPU_CHUNK = 1 << 17, 1 << 20
ACCELERATOR_CHUNK = 1 << 22


def chunk_size(device: torch.device) -> int:
    """Return the number of elements that are worked on at once, a multiple of 4."""
    if device.type != "cpu":
        return ACCELERATOR_CHUNK
    return min(CPU_CHUNK_PER_THREAD * torch.get_num_threads(), LARGEST_CPU_CHUNK)


def chunks(size: int, *vectors: Tensor, start: int = 0) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yield the index of each chunk's first element and the chunk's part of each vector.

    Args:
        size: Elements in a chunk; the last one may have fewer.
        vectors: All of one length.
        start: Index of the first chunk's first element.

    """
    elements = vectors[0].numel()
    if start > 0:
        vectors = tuple(vector[start:] for vector in vectors)
    if start < elements <= start + size:  # the common case; a split takes as long as merging 10,000
        yield start, vectors
    elif start < elements:
        yield from zip(
            range(start, elements, size),
            zip(*(torch.split(vector, size) for vector in vectors), strict=True),
            strict=True,
        )


@dataclass
class Buffers:
    """All the memory that a merge needs beside its inputs and its output.

    Every tensor has the shape (capacity,) and the dtype of the arithmetic.
    """

    mask_buffers: MaskBuffers
    base: Tensor
    delta: Tensor
    mask: Tensor
    sum: Tensor
    magnitudes: Tensor
    signed_weights: Tensor
    weights: Tensor
    scratch: Tensor
    _part: Buffers | None = field(default=None, init=False, repr=False)

    @property
    def capacity(self) -> int:
        """Elements in a chunk."""
        return self.base.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return self.base.dtype

    @classmethod
    def allocate(cls, elements: int, device: torch.device, dtype: torch.dtype) -> Buffers:
        """Allocate for up to ``elements`` elements on ``device``."""
        tensors = [torch.empty(elements, dtype=dtype, device=device) for _ in range(8)]
        return cls(MaskBuffers.allocate(elements, device), *tensors)

    @classmethod
    def of_this_thread(cls, device: torch.device, dtype: torch.dtype) -> Buffers:
        """Return the calling thread's buffers, which are made once and then kept."""
        kept: dict[tuple[torch.device, torch.dtype], Buffers]
        kept = _PER_THREAD.__dict__.setdefault("buffers", {})
        buffers = kept.get((device, dtype))
        capacity = chunk_size(device)
        if buffers is None or buffers.capacity != capacity:
            buffers = kept[device, dtype] = cls.allocate(capacity, device, dtype)
        return buffers

    def first(self, elements: int) -> Buffers:
        """Return views of the first ``elements`` elements."""
        if elements == self.capacity:
            return self
        if self._part is None or self._part.capacity != elements:
            self._part = Buffers(
                self.mask_buffers.first(elements),
                self.base[:elements],
                self.delta[:elements],
                self.mask[:elements],
                self.sum[:elements],
                self.magnitudes[:elements],
                self.signed_weights[:elements],
                self.weights[:elements],
                self.scratch[:elements],
            )
        return self._part


_PER_THREAD = threading.local()
