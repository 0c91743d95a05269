"""The keep mask of DARE: a function of the weights and the seed, and of nothing else.

Element ``i`` of a fine-tuned tensor is kept iff ``lane(key, i) < T - 2**15``:

* ``key`` is a hash of the seed and the fine-tuned tensor itself (:func:`mask_key`), so no name,
  path, position, order, thread or device plays a part: equal tensors in, equal tensors out, as is
  needed for tied embeddings, and for checkpoints whose names differ by a prefix.
* word ``j`` of the key's stream is output ``j`` of SplitMix64 started at ``key`` (Steele, Lea,
  Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). It is computed from
  ``j`` alone, without the words before it.
* ``lane(key, i)`` is the ``i mod 4``-th 16 bits of word ``i div 4``, counted from the low end,
  read as a signed integer (-2**15 to 2**15 - 1), which needs no conversion.
* ``T`` (:func:`threshold`) is the density in units of 1 / 65536.

A lower density keeps a subset of what a higher density keeps.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

LANES_PER_WORD = 4
LANE_VALUES = 1 << 16

CHECKSUM_BLOCK = 1 << 15  # bytes under one checksum
_WORD_BYTES = 8


def _signed(word: int) -> int:
    """Return the 64-bit ``word`` as torch's int64 holds it."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def threshold(density: float) -> int:
    """Return T, how many of the 65536 lane values keep an element: 1 or more for a density above 0.

    The density that results is ``T / 65536``; dividing survivors by exactly that is unbiased.
    """
    if density <= 0:
        return 0
    return min(LANE_VALUES, max(1, round(density * LANE_VALUES)))


def largest_lane(t: int) -> int:
    """Return the largest lane that T, from 1 to 65536, keeps."""
    return t - 1 - (LANE_VALUES >> 1)


def mask_key(
    seed: int, tensor: Tensor, *, shape: Sequence[int] | None = None, sums: bytes | None = None
) -> int:
    """Return the 64-bit key of a fine-tuned tensor's mask: the first 8 bytes of a BLAKE2b hash.

    The tensor's values are a part of it, so that models get independent masks wherever they
    stand in a config, and so that a merge of merges draws anew.

    Args:
        seed: Any integer.
        tensor: The fine-tuned tensor: any shape, strides, floating-point dtype and device.
        shape: Its shape, where ``tensor`` is the vector of its elements.
        sums: Its :func:`checksums`, if they are known.

    """
    header = (seed, str(tensor.dtype), tuple(tensor.shape if shape is None else shape))
    return _hash(header, tensor, sums)


def rounding_key(
    seed: int,
    base: Tensor,
    keys: Iterable[int],
    *,
    shape: Sequence[int] | None = None,
    sums: bytes | None = None,
) -> int:
    """Return the 64-bit key of the stream that rounds a merged tensor, as :func:`mask_key` does.

    ``keys``: those of the masks, in an order that does not depend on that of the models.
    """
    of_base = tuple(base.shape if shape is None else shape)
    return _hash(("rounding", seed, str(base.dtype), of_base, tuple(keys)), base, sums)


def _hash(header: tuple[Any, ...], tensor: Tensor, sums: bytes | None) -> int:
    """Hash a header, the checksums of all whole blocks of a tensor's bytes, and the rest."""
    vector = tensor.detach().resolve_neg().reshape(-1)
    digest = hashlib.blake2b(
        repr(header).encode() + b"\0", digest_size=8, person=b"mergekit-dare/1"
    )
    whole = vector.nbytes // CHECKSUM_BLOCK
    if whole:
        digest.update(checksums(vector) if sums is None else sums)
        vector = vector[whole * CHECKSUM_BLOCK // vector.element_size() :]
    digest.update(_bytes(vector))
    return int.from_bytes(digest.digest(), "little")


def checksums(vector: Tensor) -> bytes:
    """Return a checksum of each 32 KiB of a vector's bytes, except the bytes after the last.

    A checksum is the wrapping int64 sum of a block's 8-byte words. Integer sums come out equal
    in every order, hence on every device and number of threads, at the speed of memory.
    """
    elements = CHECKSUM_BLOCK // vector.element_size()
    whole = vector[: vector.numel() // elements * elements]
    if whole.storage_offset() * whole.element_size() % _WORD_BYTES:  # cannot be viewed as words
        whole = whole.clone()
    return _bytes(whole.view(torch.int64).view(-1, CHECKSUM_BLOCK // _WORD_BYTES).sum(dim=1))


def _bytes(vector: Tensor) -> bytes:
    here = vector.cpu()
    return ctypes.string_at(address_of(here), here.nbytes)


def address_of(vector: Tensor) -> int:
    """Return where a tensor's data is; RuntimeError if it has none, like a fake tensor."""
    address = vector.data_ptr()
    if address == 0 and vector.numel() > 0:
        raise RuntimeError(f"a {type(vector).__name__} that holds no data cannot be merged")
    return address


def splitmix64(key: int, words: slice, device: torch.device) -> Tensor:
    """Return some outputs of SplitMix64, counted from 0, as torch's signed int64.

    ``key``: the state before the first output, a 64-bit integer.
    """
    z = torch.arange(words.start + 1, words.stop + 1, dtype=torch.int64, device=device)
    z = _signed(key) + z * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, count: int) -> Tensor:
    """Shift right as unsigned integers do: torch's shifts copy the sign bit."""
    return z >> count & (1 << 64 - count) - 1


def lanes_of(key: int, piece: slice, device: torch.device) -> Tensor:
    """Return the lanes of some elements, starting at a multiple of 4, as int16 for masks."""
    first = piece.start // LANES_PER_WORD
    words = slice(first, -(-piece.stop // LANES_PER_WORD))
    lanes = splitmix64(key, words, device).view(torch.int16)
    return lanes[: piece.stop - piece.start]


def unsigned_lanes(key: int, piece: slice, device: torch.device) -> Tensor:
    """Return :func:`lanes_of` as unsigned integers: int32, from 0 to 65535."""
    return lanes_of(key, piece, device).int() + LANE_VALUES // 2
