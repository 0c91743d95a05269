"""The fixed amount of memory in which tensors of any size are merged, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergekit_dare.kernel import threads
from mergekit_dare.kernel.masks import LANES_PER_WORD, MaskBuffers, words_of
from mergekit_dare.kernel.rounding import bits_of

# Elements in a chunk. A smaller one wastes time on calls, and on waiting for the interpreter
# between them; a larger one does not stay in a cache. An accelerator needs enough elements to be
# busy. Buffers take 10 MB on a CPU, in each thread that works on a chunk without a recording, and
# 170 MB on an accelerator.
CPU_CHUNK, ACCELERATOR_CHUNK = 1 << 18, 1 << 22


def chunk_size(device: torch.device) -> int:
    """Return the number of elements that are worked on at once, a multiple of 4."""
    return CPU_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK


def chunks(size: int, *vectors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yield the index of each chunk's first element and the chunk's part of each vector.

    Args:
        size: Elements in a chunk; the last one may have fewer.
        vectors: All of one length.

    """
    elements = vectors[0].numel()
    if 0 < elements <= size:  # the common case; a split takes as long as merging 10,000
        yield 0, vectors
    elif elements > 0:
        yield from zip(
            range(0, elements, size),
            zip(*(torch.split(vector, size) for vector in vectors), strict=True),
            strict=True,
        )


@dataclass
class Buffers:
    """All the memory that a merge needs beside its inputs and its output.

    Every tensor has the shape (capacity,) and the dtype of the arithmetic, but for

    * ``delta_bits`` and ``scratch_bits``: the integers of the bits of ``delta`` and ``scratch``;
    * ``masks``: several models' masks, shape (models, capacity), in the memory of the one, and the
      scratch space for them; None where they would be too large.
    """

    mask_buffers: MaskBuffers
    base: Tensor
    delta: Tensor
    delta_bits: Tensor
    mask: Tensor
    sum: Tensor
    magnitudes: Tensor
    signed_weights: Tensor
    weights: Tensor
    scratch: Tensor
    scratch_bits: Tensor
    masks: tuple[Tensor, MaskBuffers] | None = field(default=None, init=False)
    _part: Buffers | None = field(default=None, init=False, repr=False)
    _part_is_for: tuple[int, int] = field(default=(0, 0), init=False, repr=False)

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
        masks = MaskBuffers.allocate(elements, device)
        base, delta, mask, sum_, magnitudes, signed_weights, weights, scratch = (
            torch.empty(elements, dtype=dtype, device=device) for _ in range(8)
        )
        sums = (sum_, magnitudes, signed_weights, weights)
        return cls(masks, base, delta, bits_of(delta), mask, *sums, scratch, bits_of(scratch))

    def tensors(self) -> list[Tensor]:
        """Return what :meth:`of_tensors` takes: all of them, but for ``masks``."""
        m, sums = self.mask_buffers, (self.sum, self.magnitudes, self.signed_weights, self.weights)
        of_delta, of_scratch = (self.delta, self.delta_bits), (self.scratch, self.scratch_bits)
        of_masks = (m.steps, m.words, m.lanes, m.shifted)
        return [*of_masks, self.base, *of_delta, self.mask, *sums, *of_scratch]

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor]) -> Buffers:
        """Return the buffers of which :meth:`tensors` are these."""
        of_masks, base = tensors[:4], tensors[4]
        return cls(MaskBuffers(base.numel(), *of_masks), *tensors[4:])

    @classmethod
    @contextmanager
    def lent(cls, device: torch.device, dtype: torch.dtype, elements: int = 0) -> Iterator[Buffers]:
        """Lend buffers to one borrower at a time; they are made once and then kept.

        They are for as many elements as asked for, else for a chunk.
        """
        capacity = elements or chunk_size(device)
        kept = _KEPT.setdefault((device, dtype, capacity), [])
        try:
            buffers = kept.pop()  # in one step, whichever thread asks
        except IndexError:
            with threads.single():
                buffers = cls.allocate(capacity, device, dtype)
        try:
            yield buffers
        finally:
            kept.append(buffers)

    def first(self, elements: int, models: int = 1) -> Buffers:
        """Return views of the first ``elements`` elements, for a merge of so many models."""
        if elements == self.capacity:
            return self
        if self._part is None or self._part_is_for != (elements, models):
            self._part, self._part_is_for = self._first(elements, models), (elements, models)
        return self._part

    def _first(self, elements: int, models: int) -> Buffers:
        part = Buffers(
            self.mask_buffers.first(elements),
            self.base[:elements],
            self.delta[:elements],
            self.delta_bits[:elements],
            self.mask[:elements],
            self.sum[:elements],
            self.magnitudes[:elements],
            self.signed_weights[:elements],
            self.weights[:elements],
            self.scratch[:elements],
            self.scratch_bits[:elements],
        )
        # With so few, calls of torch are what takes the time; more it would split among threads.
        most = min(threads.TORCHS_LEAST, self.capacity) if self.base.device.type == "cpu" else 0
        if models > 1 and models * words_of(elements) * LANES_PER_WORD <= most:
            masks = self.mask[: models * elements].view(models, elements)
            part.masks = masks, self.mask_buffers.first_of_models(elements, models)
        return part


_KEPT: dict[tuple[torch.device, torch.dtype, int], list[Buffers]] = {}
