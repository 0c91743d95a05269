"""Numbers as tensors store them, in what Numba compiles: how each dtype is widened and narrowed.

NumPy has no bfloat16, so it is stored as uint16; float16 as int16, by bit operations, since the
instructions for it are not on every processor.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

U16, U32, U64, I16 = np.uint16, np.uint32, np.uint64, np.int16
F32, F64 = np.float32, np.float64
ZERO = F32(0)


def difference(x, y):
    """Return x - y, which is 0 where both are equal, though infinite."""
    return x - y if x != y else ZERO


def from_bfloat16(x):
    """bfloat16 is the upper half of float32."""
    return U32(U32(x) << U32(16)).view(F32)


def to_bfloat16(x, out):
    """Round to nearest, half to even."""
    bits = F32(x).view(U32)
    return U16((bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16))


def from_float16(x):
    """Move the bits into place, and change the exponent's bias.

    Subnormal numbers are found from normal ones alone, as a processor may be set to flush others.
    """
    magnitude = U32(U32(x & I16(0x7FFF)) << U32(13))
    normal = U32(magnitude + U32(112 << 23))
    subnormal = F32(U32(magnitude + U32(113 << 23)).view(F32) - F32(2.0**-14)).view(U32)
    finite = normal if magnitude >= U32(1 << 23) else subnormal
    wide = finite if magnitude < U32(0x0F800000) else U32(0x7F800000)
    return U32(wide | (U32(x) & U32(0x8000)) << U32(16)).view(F32)


def to_float16(x, out):
    """Round to nearest, half to even."""
    bits = F32(x).view(U32)
    magnitude = U32(bits & U32(0x7FFFFFFF))
    odd = (magnitude >> U32(13)) & U32(1)
    # Numba's sums of uint32 are uint64: made uint32 again, they do not keep vectors half as wide.
    normal = U32(magnitude + U32(0xFFF) + odd - U32(112 << 23)) >> U32(13)
    # 0.5 has units of 2**-24, as subnormal numbers in float16 have.
    subnormal = U32(F32(magnitude.view(F32) + F32(0.5)).view(U32) - U32(0x3F000000))
    finite = normal if magnitude >= U32(0x38800000) else subnormal
    rounded = finite if magnitude < U32(0x477FF000) else U32(0x7C00)
    return I16(rounded | (bits >> U32(16)) & U32(0x8000))


def widen(x):
    """Return a stored number as float32 or float64; uint16 holds bfloat16, and int16 float16."""


def narrow(x, out):
    """Return a number as the array ``out`` stores it, rounded to nearest."""


def magnitude_bits(x):
    """Return the bits of |x|, which are in the order of the numbers; NaN comes last."""


def power_of_two(x):
    """Return the power of two below |x|: its bits without those of the fraction."""


@overload(difference)
def _difference(x, y):
    return difference


@overload(widen)
def _widen(x):
    return {types.uint16: from_bfloat16, types.int16: from_float16}.get(x, lambda x: x)


@overload(narrow)
def _narrow(x, out):
    return {types.uint16: to_bfloat16, types.int16: to_float16}.get(out.dtype, lambda x, out: x)


@overload(magnitude_bits)
def _magnitude_bits(x):
    if x == types.float32:
        return lambda x: U32(F32(x).view(U32) & U32(0x7FFFFFFF))
    return lambda x: U64(F64(x).view(U64) & U64(0x7FFF_FFFF_FFFF_FFFF))


@overload(power_of_two)
def _power_of_two(x):
    if x == types.float32:
        return lambda x: U32(F32(x).view(U32) & U32(0x7F800000)).view(F32)
    return lambda x: U64(F64(x).view(U64) & U64(0x7FF0_0000_0000_0000)).view(F64)


@intrinsic
def pointer(context, address):
    """Return an address as a pointer.

    Tensors of several dtypes, as many as there are models, cannot be one argument otherwise: Numba
    would compile all of this again for each number of models and mixture of dtypes.
    """

    def build(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.uint64), build
