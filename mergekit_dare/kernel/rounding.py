"""The one rounding at the end of a merge: to nearest, or stochastic and thereby unbiased.

In bfloat16, rounding to nearest loses a change of less than half a unit in the last place, and
makes a larger one a whole unit. Stochastic rounding takes one of the two neighbors, with
probabilities such that the mean is the number itself. A number that the dtype can represent stays
as it is.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from mergekit_dare.kernel.masks import LANE_VALUES


class Rounding(Enum):
    """How a merged tensor is rounded to the dtype of the base."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


# The dtypes that results are rounded to; the arithmetic is in wider ones.
NARROW = (torch.bfloat16, torch.float16)

# The integer of a float's width, and the bits of its exponent, which alone are a power of two.
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
_EXPONENTS = {torch.float32: 0x7F80_0000, torch.float64: 0x7FF0_0000_0000_0000}


def round_stochastically(result: Tensor, lanes: Tensor, dtype: torch.dtype) -> Tensor:
    """Round up or down, as each element's lane says.

    Unbiased: exactly for float32 to bfloat16 and for normal numbers in float16, to within 2**-17
    of a unit in the last place elsewhere (subnormal numbers in float16, float64 results). What
    lies beyond the largest finite number becomes that number; infinities stay.

    Args:
        result: float32 or float64, shape (elements,).
        lanes: Uniform whole numbers from 0 to 65535, integers of shape (elements,).
        dtype: bfloat16 or float16.

    Returns:
        Shape (elements,) and ``dtype``.

    """
    info = torch.finfo(dtype)
    result = torch.where(result.isinf(), result, result.clamp(-info.max, info.max))
    bits = result.view(_INTEGERS[result.dtype])
    if dtype == torch.bfloat16 and result.dtype == torch.float32:
        # bfloat16 is the upper half of float32: a carry out of the lower half gives the next one.
        return (bits + lanes.int() & -LANE_VALUES).view(torch.float32).to(dtype)
    # A unit in the last place is eps times the power of two below a number; subnormal numbers have
    # that of the least normal one. Dividing and multiplying by it is exact.
    power = (bits & _EXPONENTS[result.dtype]).view(result.dtype)
    unit = power.clamp(info.smallest_normal, info.max) * info.eps
    units = result / unit
    below = units.floor()
    up = lanes < ((units - below) * LANE_VALUES).round()
    return ((below - (0 - up.to(result.dtype))) * unit).to(dtype)  # - 0 keeps -0.0
