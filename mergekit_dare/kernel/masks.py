"""The keep mask of DARE: a function of the weights and the seed, of nothing else.

Element ``i`` of a fine-tuned tensor is kept iff ``lane(key, i) < T - 2**15``:

* ``key`` is a hash of the seed and the fine-tuned tensor itself (:func:`mask_key`), so no name,
  path, position, order, thread or device plays a part: equal tensors in, equal tensors out, which
  tied embeddings need, and checkpoints whose names differ by a prefix.
* word ``j`` of the key's stream is output ``j`` of SplitMix64 started at ``key`` (Steele, Lea,
  Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). It is computed from
  ``j`` alone, without the words before it.
* ``lane(key, i)`` is the ``i mod 4``-th 16 bits of word ``i div 4``, counted from the low end,
  read as a signed integer (-2**15 to 2**15 - 1), which needs no conversion.
* ``T`` (:func:`threshold`) is the density in units of 1 / 65536.

A lower density keeps a subset of what a higher density keeps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LANES_PER_WORD = 4
LANE_VALUES = 1 << 16

_GAMMA = 0x9E3779B97F4A7C15
_WORD_BYTES = 8
_FINGERPRINT_BLOCK = 1 << 15  # bytes under one checksum
_FINGERPRINT_PIECE = 1 << 25  # bytes under one call


def _signed(word: int) -> int:
    """Return the 64-bit ``word`` as torch's int64 holds it."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def _constant(word: int) -> Tensor:
    return torch.tensor(_signed(word), dtype=torch.int64, device="cpu")


# 0-dim tensors: torch calls with Python numbers take up to twice as long. And in C++, to which
# torch compiles, signed sums and products that wrap around are undefined: of numbers that it does
# not know, as long as they stay tensors, a compiler concludes nothing; of these, one concluded that
# a loop ends after 3 words, or after 16.
_GAMMA_TENSOR = _constant(_GAMMA)
_MULTIPLIER_1, _MULTIPLIER_2 = _constant(0xBF58476D1CE4E5B9), _constant(0x94D049BB133111EB)
# int64 shifts to the right copy the sign bit; the bit mask makes the shift a logical one. There is
# nothing undefined in these, so compiled code has them as the numbers they are.
_SHIFTS = [(count, (1 << (64 - count)) - 1) for count in (30, 27, 31)]
_SHIFT_TENSORS = [(_constant(count), _constant(low_bits)) for count, low_bits in _SHIFTS]

# T - 2**15 for each T: what a lane is compared with.
_LANE_THRESHOLDS = torch.arange(-(1 << 15), 1 << 15, device="cpu").to(torch.int16)
# 1 in each lane of a word, as what is multiplied with and as a bit mask; the top bit of each lane,
# and all other bits.
_EACH_LANE = 0x0001000100010001
_EACH_LANE_TENSOR = _constant(_EACH_LANE)
_TOP_BITS, _LOW_BITS = _signed(0x8000800080008000), 0x7FFF7FFF7FFF7FFF
# 1.0 has the bits of 2**14 less 2 to the power of this.
_FRACTION_BITS = {torch.bfloat16: 7, torch.float16: 10}


def threshold(density: float) -> int:
    """Return T, the number of the 65536 lane values that keep an element.

    Args:
        density: The fraction of elements to keep, from 0 to 1.

    Returns:
        ``round(density * 65536)``, but at least 1 for a density above 0. The density that is
        met is ``T / 65536``; dividing survivors by just that keeps the estimate unbiased.

    """
    if density <= 0:
        return 0
    return min(LANE_VALUES, max(1, round(density * LANE_VALUES)))


def largest_lane(t: int) -> int:
    """Return the largest lane that T, from 1 to 65536, keeps."""
    return t - 1 - (LANE_VALUES >> 1)


def mask_key(seed: int, tensor: Tensor) -> int:
    """Return the 64-bit key of a fine-tuned tensor's mask.

    The tensor's values are a part of it, so that models get independent masks wherever they
    stand in a config, and so that a merge of merges draws anew.

    Args:
        seed: Any integer.
        tensor: The fine-tuned tensor: any shape, strides, floating-point dtype and device.

    Returns:
        The first 8 bytes of a BLAKE2b hash, little-endian.

    """
    return _hash((seed, str(tensor.dtype), tuple(tensor.shape)), _fingerprint(tensor))


def rounding_key(seed: int, base: Tensor, keys: Iterable[int]) -> int:
    """Return the 64-bit key of the stream that rounds a merged tensor.

    Args:
        seed: Any integer.
        base: The base model's tensor: any shape, strides, floating-point dtype and device.
        keys: Those of the masks, in an order that does not depend on that of the models.

    Returns:
        The first 8 bytes of a BLAKE2b hash, little-endian.

    """
    header = ("rounding", seed, str(base.dtype), tuple(base.shape), tuple(keys))
    return _hash(header, _fingerprint(base))


def _hash(header: tuple[Any, ...], parts: Iterable[bytes]) -> int:
    digest = hashlib.blake2b(digest_size=8, person=b"mergekit-dare/1")
    for part in (repr(header).encode(), b"\0", *parts):
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


def _fingerprint(tensor: Tensor) -> list[bytes]:
    """Return a checksum of each 32 KiB of the tensor's bytes in row order, then the rest as is.

    A checksum is the wrapping int64 sum of a block's 8-byte words. Integer sums come out equal
    in every order, hence on every device and number of threads, at the speed of memory.
    """
    values = tensor.detach().reshape(-1)
    size = values.element_size()
    whole = values.numel() * size // _FINGERPRINT_BLOCK * _FINGERPRINT_BLOCK // size
    if whole == 0:
        return [_bytes(values)]
    return [_bytes(part) for part in (*_block_sums(values[:whole]), values[whole:])]


def _block_sums(values: Tensor) -> Iterator[Tensor]:
    piece_elements = _FINGERPRINT_PIECE // values.element_size()
    for start in range(0, values.numel(), piece_elements):
        piece = values[start : start + piece_elements]
        if piece.storage_offset() * piece.element_size() % _WORD_BYTES:  # no view as words
            piece = piece.clone()
        yield piece.view(torch.int64).view(-1, _FINGERPRINT_BLOCK // _WORD_BYTES).sum(dim=1)


def _bytes(tensor: Tensor) -> bytes:
    if tensor.stride(0) != 1:  # torch calls a single element contiguous, whatever its stride
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return bytes(tensor.view(torch.uint8).numpy(force=True))


def words_of(elements: int) -> int:
    """Return how many words have a lane for each element."""
    return -(-elements // LANES_PER_WORD)


@dataclass
class MaskBuffers:
    """Scratch space for the mask of some elements, or for those of several models.

    Attributes:
        elements: How many.
        steps: int64, shape (words,): (j + 1) * gamma, SplitMix64's state less its key.
        words: int64, shape (words,) or (models, words).
        lanes: int16, shape (elements,) or (models, elements): the same memory as ``words``.
        shifted: int64, shape of ``words``.

    """

    elements: int
    steps: Tensor
    words: Tensor
    lanes: Tensor
    shifted: Tensor

    @classmethod
    def allocate(cls, elements: int, device: torch.device) -> MaskBuffers:
        """Allocate for up to ``elements`` elements on ``device``."""
        count = words_of(elements)
        steps = torch.arange(1, count + 1, dtype=torch.int64, device=device)
        steps.mul_(_GAMMA_TENSOR)
        words = torch.empty_like(steps)
        lanes = words.view(torch.int16)[:elements]
        return cls(elements, steps, words, lanes, torch.empty_like(steps))

    def first(self, elements: int) -> MaskBuffers:
        """Return views of the part for the first ``elements`` elements."""
        count = words_of(elements)
        return MaskBuffers(
            elements,
            self.steps[:count],
            self.words[:count],
            self.lanes[:elements],
            self.shifted[:count],
        )

    def first_of_models(self, elements: int, models: int) -> MaskBuffers:
        """Return views of a part for the first ``elements`` elements of each of several models."""
        count = words_of(elements)
        words = self.words[: models * count].view(models, count)
        lanes = words.view(torch.int16)[:, :elements]
        shifted = self.shifted[: models * count].view(models, count)
        return MaskBuffers(elements, self.steps[:count], words, lanes, shifted)


def state_before(key: int, start: int) -> int:
    """Return SplitMix64's state before the word of an element, as torch's signed integer.

    Args:
        key: The tensor's key, from :func:`mask_key`.
        start: Index of the element in the tensor in row order, a multiple of 4.

    """
    return _signed(key + start // LANES_PER_WORD * _GAMMA)


def splitmix64(state: int | Tensor, buffers: MaskBuffers) -> Tensor:
    """Return outputs of SplitMix64, as many as ``buffers`` has words.

    Args:
        state: The state before the first output, from :func:`state_before`; for several streams
            shape (models, 1).
        buffers: Scratch space; overwritten.

    Returns:
        ``buffers.words``: the 64-bit outputs, as torch's signed integers.

    """
    z, shifted = buffers.words, buffers.shifted
    torch.add(buffers.steps, state, out=z)
    _xor_shift(z, 0, shifted).mul_(_MULTIPLIER_1)
    _xor_shift(z, 1, shifted).mul_(_MULTIPLIER_2)
    return _xor_shift(z, 2, shifted)


def _xor_shift(z: Tensor, step: int, shifted: Tensor) -> Tensor:
    count, low_bits = (_SHIFTS if torch.compiler.is_compiling() else _SHIFT_TENSORS)[step]
    torch.bitwise_right_shift(z, count, out=shifted)
    return z.bitwise_xor_(shifted.bitwise_and_(low_bits))


def keep_mask(
    state: int | Tensor,
    t: int | Tensor,
    out: Tensor,
    buffers: MaskBuffers,
    narrow: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Write the keep mask of some elements of a tensor into ``out``.

    Args:
        state: Where the elements are in which mask, from :func:`state_before`.
        t: The density in units of 1 / 65536, from :func:`threshold`; or the :func:`largest_lane`
            that it keeps as a tensor of int16, for a recording of any density.
        out: Shape (buffers.elements,), any dtype: becomes 1 where an element is kept, else 0.
        buffers: Scratch space; overwritten.
        narrow: For compiled code only, as :func:`kept_lanes` takes it.

    Returns:
        ``out``.

    """
    if torch.compiler.is_compiling() and isinstance(t, Tensor):
        return out.copy_(kept_lanes(splitmix64(state, buffers), t, narrow))
    if not isinstance(t, Tensor) and t >= LANE_VALUES:
        return out.fill_(1)
    splitmix64(state, buffers)
    if isinstance(t, Tensor):
        return out.copy_(buffers.lanes.le_(t))
    return out.copy_(buffers.lanes.lt_(_LANE_THRESHOLDS[t]))


def keep_masks(
    states: Sequence[int], thresholds: Sequence[int], out: Tensor, buffers: MaskBuffers
) -> Tensor:
    """Write the keep masks of several models into ``out``, with hardly more calls than one takes.

    Args:
        states: Of each model, as for :func:`keep_mask`.
        thresholds: Of each model, below 65536.
        out: On the CPU, shape (models, buffers.elements), any dtype.
        buffers: Scratch space, from :meth:`MaskBuffers.first_of_models`; overwritten.

    Returns:
        ``out``.

    """
    splitmix64(torch.tensor(states, dtype=torch.int64, device="cpu").unsqueeze(1), buffers)
    t = _LANE_THRESHOLDS[thresholds[0]]
    if any(other != thresholds[0] for other in thresholds):
        t = _LANE_THRESHOLDS[list(thresholds)].unsqueeze(1)
    return out.copy_(buffers.lanes.lt_(t))


def uniform_lanes(state: int | Tensor, out: Tensor, buffers: MaskBuffers) -> Tensor:
    """Write each element's lane, read as an unsigned integer, into ``out``.

    Args:
        state: Where the elements are in which stream, from :func:`state_before`.
        out: Shape (buffers.elements,), any dtype that holds 0 to 65535.
        buffers: Scratch space; overwritten.

    Returns:
        ``out``.

    """
    splitmix64(state, buffers)
    return out.copy_(buffers.lanes).add_(1 << 15)


def kept_lanes(words: Tensor, t: Tensor, narrow: torch.dtype) -> Tensor:
    """Compare the four lanes of each word at once, without 16-bit operations.

    torch's compiler has no vectors of 16-bit integers; one by one, these operations on words would
    take longer than one comparison of lanes.

    Args:
        words: int64, shape (words,).
        t: int64, shape (): from 1 to 65536.
        narrow: float16 for weights in float16, else bfloat16: where both are in one loop, compiled
            code fills but half of its vectors, and takes twice as long.

    Returns:
        ``narrow``, shape (4 * words,): 1 where an element is kept, else 0.

    """
    # A kept lane's unsigned value, which has the other top bit, is at most T - 1.
    largest = (t - 1) * _EACH_LANE_TENSOR
    low_bits_at_most = (largest | _TOP_BITS) - (words & _LOW_BITS)  # in the top bits
    kept = (largest & words) | ((largest ^ words) & low_bits_at_most)
    ones = (kept >> 15) & _EACH_LANE
    return ((ones << 14) - (ones << _FRACTION_BITS[narrow])).view(narrow)  # 1.0
