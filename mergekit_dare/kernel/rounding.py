"""The one rounding at the end of a merge: to nearest, or stochastic and thereby unbiased.

In bfloat16 a change of less than half a unit in the last place is lost when it is rounded to
nearest, and one of more becomes a whole unit. Stochastic rounding takes one of the two neighbours,
with probabilities whose mean is the number itself. A number that the dtype holds stays as it is.
"""

from __future__ import annotations

import math
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


def round_stochastically(
    result: Tensor, lanes: Tensor, out: Tensor, *, infinities: bool = False
) -> None:
    """Round ``result`` to ``out``, up or down as each element's lane says.

    Unbiased: exactly for float32 to bfloat16 and for normal numbers in float16, to within 2**-17
    of a unit in the last place elsewhere (subnormal numbers in float16, float64 results). What
    lies beyond the largest finite number, and is rounded to it, stays it.

    Args:
        result: float32 or float64, shape (elements,); overwritten.
        lanes: Uniform whole numbers from 0 to 65535, shape and dtype of ``result``; overwritten.
        out: bfloat16 or float16, shape (elements,).
        infinities: Whether there may be infinities in ``result``, which stay.

    """
    largest = torch.finfo(out.dtype).max
    if infinities:
        infinite = torch.isinf(result)
        result = torch.where(infinite, result, result.clamp(-largest, largest))
    else:
        result.clamp_(-largest, largest)
    if out.dtype == torch.bfloat16 and result.dtype == torch.float32:
        _add_to_lost_bits(result, lanes, out)
    else:
        _choose_neighbour(result, lanes, out)


def _add_to_lost_bits(result: Tensor, lanes: Tensor, out: Tensor) -> None:
    """bfloat16 is the upper half of float32: a carry out of the lower half takes the next one."""
    bits = result.view(torch.int32)
    bits.add_(lanes.to(torch.int32)).bitwise_right_shift_(16)
    out.view(torch.int16).copy_(bits)


def _choose_neighbour(result: Tensor, lanes: Tensor, out: Tensor) -> None:
    info = torch.finfo(out.dtype)
    # result = m 2**e with m from 0.5 to 1; subnormal numbers have the unit of the least normal one.
    _, exponent = torch.frexp(torch.where(torch.isfinite(result), result, 1))
    _, least = math.frexp(info.smallest_normal)
    bits = math.frexp(info.eps / 2)[1] - 1
    # The unit is 2**(e + bits): in float64, e + bits + 1023 above the 52 bits of the fraction.
    unit = (exponent.long().clamp_(min=least) + (bits + 1023) << 52).view(torch.float64)
    units = result.double() / unit
    below = torch.floor(units)
    rest = units - below
    up = lanes.double() < torch.round(rest * LANE_VALUES)
    exact = (rest == 0) | ~torch.isfinite(result)
    out.copy_(torch.where(exact, result.double(), (below + up) * unit))
