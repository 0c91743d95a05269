"""Merging on the CPU: :mod:`mergekit_dare.kernel.loops`, piece by piece, in several threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergekit_dare.kernel import compiling, loops, masks, threads
from mergekit_dare.kernel.formula import Job
from mergekit_dare.kernel.masks import CHECKSUM_BLOCK, address_of

PIECE = 1 << 18  # elements that one thread merges before it asks for more, a multiple of 4
SUMS = 1 << 4  # checksums that one thread computes before it asks for more
# Elements times models, and checksums, that keep a thread busy for longer than it takes to start.
LEAST_WORK, LEAST_SUMS = 1 << 20, 1 << 9

assert CHECKSUM_BLOCK == 8 * loops.WORDS

_CODES = {
    torch.bfloat16: loops.BFLOAT16,
    torch.float16: loops.FLOAT16,
    torch.float32: loops.FLOAT32,
    torch.float64: loops.FLOAT64,
}


def compile_for(dtype: torch.dtype) -> None:
    """Compile what a merge needs for a dtype of arithmetic, or load it from the cache."""
    wide, nothing = _wide(dtype), np.uint64(0)
    terms, steps, one = np.empty(0, loops.TERM[wide]), (False,) * 5, wide(1)
    for tries in (2, 1, 0):
        try:
            with compiling.LOCK, compiling.announced():
                numbers = terms, steps, one, nothing
                loops.merge_piece(nothing, nothing, 0, 0, 0, *numbers, _buffers(wide))
                loops.sum_blocks(nothing, np.empty(0, np.int64))
            return
        except OSError as error:  # compiled code cannot be kept, as on a full disk
            if not tries:
                raise
            if tries == 1:
                compiling.warn_of_no_cache(error)
        except Exception:
            if not tries or not compiling.clear_cache(loops.merge_piece, loops.sum_blocks):
                raise


def merge(job: Job, out: Tensor) -> float:
    """Merge a tensor.

    Args:
        job: The merge.
        out: A contiguous vector of the shape and dtype of ``job.theta_0``; becomes theta_0 +
            lambda * D, rounded.

    Returns:
        The largest magnitude before rounding; NaN if there is a NaN.

    """
    wide = _wide(job.dtype)
    terms = np.empty(len(job.terms), loops.TERM[wide])
    for k, term in enumerate(job.terms):
        address, code = address_of(term.theta), _CODES[term.theta.dtype]
        terms[k] = address, code, term.key, term.t, term.c, term.factor, term.weight
    to, theta_0 = np.uint64(address_of(out)), np.uint64(address_of(job.theta_0))
    elements, dtype = out.numel(), _CODES[out.dtype]
    stochastic = job.rounding_key is not None
    steps = (job.ties, job.normalize, job.by_magnitude, job.rescale, stochastic)
    lambda_, key = wide(job.lambda_), np.uint64(job.rounding_key or 0)
    bits = np.uint64 if wide is np.float64 else np.uint32

    def merge_one(
        start: int, keep: Any = (job, out)
    ) -> float:  # keeps them alive while it works on them
        stop, buffers = min(elements, start + PIECE), _buffers(wide)
        largest = loops.merge_piece(
            to, theta_0, dtype, start, stop, terms, steps, lambda_, key, buffers
        )
        return float(bits(largest).view(wide))

    # Backwards: the end of the tensors was read last, for the checksums, and may be in the cache.
    starts = range(0, elements, PIECE)[::-1]
    magnitudes = threads.run(merge_one, starts, elements * len(terms) // LEAST_WORK)
    return math.nan if any(map(math.isnan, magnitudes)) else max(magnitudes)


def checksums(vectors: Sequence[Tensor]) -> list[bytes]:
    """Return :func:`mergekit_dare.kernel.masks.checksums` of several vectors."""
    if any(address_of(vector) % 8 for vector in vectors):  # not aligned to words
        with threads.single():
            return [masks.checksums(vector) for vector in vectors]
    sums = [np.empty(vector.nbytes // CHECKSUM_BLOCK, np.int64) for vector in vectors]

    def sum_some(given: tuple[int, int]) -> None:
        k, start = given
        address = np.uint64(address_of(vectors[k]) + start * CHECKSUM_BLOCK)
        loops.sum_blocks(address, sums[k][start : start + SUMS])

    # In parallel over the vectors, as they are merged: what is read last may still be in the cache.
    longest = max(map(len, sums), default=0)
    parts = [(k, s) for s in range(0, longest, SUMS) for k in range(len(sums)) if s < len(sums[k])]
    threads.run(sum_some, parts, sum(map(len, sums)) // LEAST_SUMS)
    return [of_one.tobytes() for of_one in sums]


def _buffers(wide: Any) -> tuple[Any, ...]:
    return tuple(np.zeros((7, loops.BLOCK), wide))


def _wide(dtype: torch.dtype) -> Any:
    return np.float64 if dtype == torch.float64 else np.float32
