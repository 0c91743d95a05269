"""The one rounding at the end of a merge: to nearest, or stochastic and thereby unbiased.

In bfloat16 a change of less than half a unit in the last place is lost when it is rounded to
nearest, and one of more becomes a whole unit. Stochastic rounding takes one of the two neighbours,
with probabilities whose mean is the number itself. A number that the dtype holds stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from mergekit_dare.kernel.masks import LANE_VALUES


class Rounding(Enum):
    """How a merged tensor is rounded to the dtype of the base."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


# The dtypes that results are rounded to; wider ones are those of the arithmetic.
NARROW = (torch.bfloat16, torch.float16)


# The integers of a float's width, and the bits of its exponent: all others 0, it is a power of two.
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
_EXPONENTS = {torch.int32: 0x7F80_0000, torch.int64: 0x7FF0_0000_0000_0000}


def bits_of(numbers: Tensor) -> Tensor:
    """Return float32 or float64 numbers as integers, in the same memory."""
    return numbers.view(_INTEGERS[numbers.dtype])


@dataclass(frozen=True)
class RoundingBuffers:
    """Views and scratch space for numbers to round.

    Attributes:
        bits: The numbers' :func:`bits_of`.
        unit: Scratch space of their shape and dtype.
        unit_bits: Its :func:`bits_of`.

    """

    bits: Tensor
    unit: Tensor
    unit_bits: Tensor

    @classmethod
    def allocate(cls, result: Tensor) -> RoundingBuffers:
        """Allocate for some numbers."""
        unit = torch.empty_like(result)
        return cls(bits_of(result), unit, bits_of(unit))


def round_stochastically(
    result: Tensor,
    lanes: Tensor,
    out: Tensor,
    buffers: RoundingBuffers,
    *,
    infinities: bool = False,
) -> None:
    """Round ``result`` to ``out``, up or down as each element's lane says.

    Unbiased: exactly for float32 to bfloat16 and for normal numbers in float16, to within 2**-17
    of a unit in the last place elsewhere (subnormal numbers in float16, float64 results). What
    lies beyond the largest finite number, and is rounded to it, stays it.

    Args:
        result: float32 or float64, shape (elements,); overwritten.
        lanes: Uniform whole numbers from 0 to 65535, shape and dtype of ``result``; overwritten.
        out: bfloat16 or float16, shape (elements,).
        buffers: Of ``result``; overwritten.
        infinities: Whether there may be infinities in ``result``, which stay.

    """
    largest = torch.finfo(out.dtype).max
    if infinities:
        clamped = result.clamp(-largest, largest)
        result.copy_(torch.where(torch.isinf(result), result, clamped))
    else:
        result.clamp_(-largest, largest)
    if out.dtype == torch.bfloat16 and result.dtype == torch.float32:
        _add_to_lost_bits(result, lanes, out, buffers)
    else:
        _choose_neighbour(result, lanes, out, buffers)


def _add_to_lost_bits(result: Tensor, lanes: Tensor, out: Tensor, b: RoundingBuffers) -> None:
    """bfloat16 is the upper half of float32: a carry out of the lower half takes the next one."""
    b.bits.add_(lanes.to(torch.int32)).bitwise_and_(-LANE_VALUES)
    out.copy_(result)


def _choose_neighbour(result: Tensor, lanes: Tensor, out: Tensor, b: RoundingBuffers) -> None:
    info = torch.finfo(out.dtype)
    # A unit in the last place is eps times the power of two below a number; subnormal numbers have
    # that of the least normal one. Divided by it, and multiplied, all is exact.
    torch.bitwise_and(b.bits, _EXPONENTS[b.bits.dtype], out=b.unit_bits)
    unit = b.unit.clamp_(min=info.smallest_normal, max=info.max).mul_(info.eps)
    units = result.div_(unit)
    below = torch.floor(units)
    rest = units.sub_(below).mul_(LANE_VALUES).round_()
    # 0 is subtracted where nothing is added, so that -0.0 stays.
    minus_up = lanes.ge_(rest).sub_(1)
    out.copy_(below.sub_(minus_up).mul_(unit))
