"""The formula of DARE as plain loops, which Numba compiles: what merges tensors on a CPU.

The formula, its notation and its steps are those of :mod:`mergekit_dare.kernel.formula`, and so are
the bytes; tests hold the two together. Here they are done block by block, so that all that lies
between the inputs and the output stays in the cache next to a core.

What keeps these loops fast: each does one thing to plain arrays and has no branch but a choice
between two numbers, so that LLVM makes vector instructions of it; and none has a floating-point
reduction, which it may not reorder, so the largest magnitude is found among bits. Without
``fastmath`` nothing is contracted or reordered, hence the same bytes on every machine.

All that these loops call stands in this file and in ``numbers``, whose contents name the folder of
Numba's cache (:mod:`mergekit_dare.kernel.compiling`). Numba infers the types of what it calls.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from mergekit_dare.kernel.compiling import entry, inlined, loop
from mergekit_dare.kernel.numbers import (
    F32,
    I16,
    U16,
    U32,
    U64,
    ZERO,
    difference,
    magnitude_bits,
    narrow,
    pointer,
    power_of_two,
    widen,
)

# Elements in a block, a multiple of 4. Larger ones leave the cache, smaller ones spend more time
# between the loops.
BLOCK = 384
WORDS = 1 << 12  # of 8 bytes under one checksum

BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = range(4)
SIZES = (2, 2, 4, 8)
# A term of the sum, by the dtype of the arithmetic; ``theta`` is the address of its first element.
TERM = {
    wide: np.dtype(
        {
            "names": ("theta", "dtype", "key", "t", "c", "factor", "weight"),
            "formats": ("u8", "i8", "u8", "i8", wide, wide, wide),
        }
    )
    for wide in (np.float32, np.float64)
}

# In a loop over float64, a float32 constant becomes float64; an integer would make float32 wider.
HALF, ONE, INFINITY = F32(0.5), F32(1), F32(np.inf)
LANES, SIGN = F32(1 << 16), F32(1 << 15)
GAMMA = U64(0x9E3779B97F4A7C15)
# eps, the least normal number and the largest.
LIMITS_OF_BFLOAT16 = (F32(2.0**-7), F32(2.0**-126), F32(3.3895313892515355e38))
LIMITS_OF_FLOAT16 = (F32(2.0**-10), F32(2.0**-14), F32(65504))


# -- the steps of the formula ----------------------------------------------------------------------


@loop
def copy(n, x, theta_0):
    """Make theta_0 wide."""
    for i in range(n):
        x[i] = widen(theta_0[i])


@loop
def subtract(n, delta, theta_0):
    """Make delta_k of theta_k."""
    for i in range(n):
        delta[i] = difference(delta[i], theta_0[i])


@inlined
def draw(n, words, state):
    """Make the words of SplitMix64 after ``state``, whose lanes decide the mask."""
    for j in range((n + 3) // 4):
        z = state + U64(j + 1) * GAMMA
        z = (z ^ (z >> U64(30))) * U64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> U64(27))) * U64(0x94D049BB133111EB)
        words[j] = z ^ (z >> U64(31))


@loop
def choose_by_magnitude(n, delta, lanes, theta_0, c, t, rescale):
    """Make delta_k / pi_k of theta_k; a lane becomes -1 where the element is kept, else 0.

    pi_k = T_k / 65536 with T_k = min(65536, ceil(c_k |delta_k|)), at least t.
    """
    for i in range(n):
        delta_k = difference(delta[i], theta_0[i])
        t_k = min(max(np.ceil(abs(delta_k) * c), t), LANES)
        lanes[i] = I16(-1) if F32(lanes[i]) + SIGN < t_k else I16(0)
        delta[i] = delta_k / (t_k * (ONE / LANES) if rescale else ONE)


@inlined
def add_term(n, total, lanes, largest, theta, theta_0, factor):
    """Add w_k hat_k to the sum; m_k is 1 where a lane is at most ``largest``."""
    for i in range(n):
        m = ONE if lanes[i] <= largest else ZERO
        total[i] += difference(widen(theta[i]), theta_0[i]) * factor * m


@inlined
def add_term_and_magnitude(n, total, magnitudes, lanes, largest, theta, theta_0, factor):
    """Add w_k hat_k to the sum, and its magnitude to that of the magnitudes."""
    for i in range(n):
        m = ONE if lanes[i] <= largest else ZERO
        term = difference(widen(theta[i]), theta_0[i]) * factor * m
        total[i] += term
        magnitudes[i] += abs(term)


@loop
def add_weight(n, weights, votes, lanes, largest, delta, weight):
    """Add w_k where the term is not 0: w_k itself, and |w_k| with the sign of delta_k."""
    for i in range(n):
        m = ONE if lanes[i] <= largest else ZERO
        sign = m if delta[i] > ZERO else ZERO
        sign = -m if delta[i] < ZERO else sign
        votes[i] += sign * abs(weight)
        weights[i] += abs(sign) * weight


@inlined
def elect(n, total, magnitudes, lambda_):
    """Lambda D: the sum of the terms whose sign is that of the sum, 0 counting as +."""
    for i in range(n):
        s = ONE if total[i] >= ZERO else -ONE
        total[i] = (total[i] + s * (magnitudes[i] - abs(total[i])) * HALF) * lambda_


@loop
def elect_and_divide(n, total, magnitudes, weights, votes, lambda_):
    """Lambda D, divided by the sum of the w_k of the elected terms, or by 1 where that is 0."""
    for i in range(n):
        s = ONE if total[i] >= ZERO else -ONE
        w = (weights[i] + s * votes[i]) * HALF
        w = w if w != ZERO else ONE
        total[i] = (total[i] + s * (magnitudes[i] - abs(total[i])) * HALF) / w * lambda_


@inlined
def add_base(n, out, total, theta_0):
    """Write theta_0 + lambda D, rounded to nearest; return the bits of the largest magnitude.

    0 - D is never -0.0, so theta_0 stays as it is where D is 0.
    """
    largest = magnitude_bits(theta_0[0])
    for i in range(n):
        result = theta_0[i] - (ZERO - total[i])
        largest = max(largest, magnitude_bits(result))
        out[i] = narrow(result, out)
    return largest


@loop
def round_by_carry(n, out, result, lanes):
    """Round float32 stochastically to bfloat16, its upper half: add the lane to the lower one.

    What lies beyond the largest finite number becomes that; an infinity stays one.
    """
    limit = LIMITS_OF_BFLOAT16[2]
    for i in range(n):
        x = result[i]
        x = min(max(x, -limit), limit) if abs(x) < INFINITY else x
        lane = U32(U16(lanes[i]) ^ U16(1 << 15))
        out[i] = U16((F32(x).view(U32) + lane) >> U32(16))


@loop
def round_to_neighbor(n, out, result, lanes, limits):
    """Round stochastically in units in the last place: up where the lane is below the rest."""
    eps, smallest, limit = limits
    for i in range(n):
        x = result[i]
        x = min(max(x, -limit), limit) if abs(x) < INFINITY else x
        unit = min(max(power_of_two(x), smallest), limit) * eps
        units = x / unit
        below = np.floor(units)
        rest = np.rint((units - below) * LANES)
        up = ONE if F32(lanes[i]) + SIGN < rest else ZERO
        out[i] = narrow((below - (ZERO - up)) * unit, out)  # 0 is subtracted, so -0.0 stays


# -- blocks in memory ------------------------------------------------------------------------------


@loop
def read(n, x, address, dtype, start):
    """Read the block of a tensor that begins with element ``start``."""
    place = pointer(address + U64(SIZES[dtype] * start))
    if dtype == BFLOAT16:
        copy(n, x, carray(place, n, U16))
    elif dtype == FLOAT16:
        copy(n, x, carray(place, n, I16))
    elif dtype == FLOAT32:
        copy(n, x, carray(place, n, F32))
    else:
        copy(n, x, carray(place, n, x.dtype))


@inlined
def accumulate(n, total, magnitudes, lanes, largest, theta, theta_0, factor, ties):
    """Add the term of a model."""
    if ties:
        add_term_and_magnitude(n, total, magnitudes, lanes, largest, theta, theta_0, factor)
    else:
        add_term(n, total, lanes, largest, theta, theta_0, factor)


@inlined
def read_term(n, total, magnitudes, lanes, largest, term, start, theta_0, ties):
    """Add the term of a model that is read from memory, as nothing else asks for its delta."""
    place, factor = pointer(term.theta + U64(SIZES[term.dtype] * start)), term.factor
    if term.dtype == BFLOAT16:
        a = carray(place, n, U16)
        accumulate(n, total, magnitudes, lanes, largest, a, theta_0, factor, ties)
    elif term.dtype == FLOAT16:
        b = carray(place, n, I16)
        accumulate(n, total, magnitudes, lanes, largest, b, theta_0, factor, ties)
    elif term.dtype == FLOAT32:
        c = carray(place, n, F32)
        accumulate(n, total, magnitudes, lanes, largest, c, theta_0, factor, ties)
    else:
        d = carray(place, n, total.dtype)
        accumulate(n, total, magnitudes, lanes, largest, d, theta_0, factor, ties)


@inlined
def write(n, total, theta_0, address, dtype, start):
    """Write the block of the output, rounded to nearest; return the largest magnitude's bits."""
    place = pointer(address + U64(SIZES[dtype] * start))
    if dtype == BFLOAT16:
        return add_base(n, carray(place, n, U16), total, theta_0)
    if dtype == FLOAT16:
        return add_base(n, carray(place, n, I16), total, theta_0)
    if dtype == FLOAT32:
        return add_base(n, carray(place, n, F32), total, theta_0)
    return add_base(n, carray(place, n, total.dtype), total, theta_0)


@loop
def write_stochastically(n, result, address, dtype, start, lanes):
    """Round the block of the output, in bfloat16 or float16, stochastically."""
    place = pointer(address + U64(SIZES[dtype] * start))
    if dtype == FLOAT16:
        round_to_neighbor(n, carray(place, n, I16), result, lanes, LIMITS_OF_FLOAT16)
    elif result.itemsize == 4:
        round_by_carry(n, carray(place, n, U16), result, lanes)
    else:
        round_to_neighbor(n, carray(place, n, U16), result, lanes, LIMITS_OF_BFLOAT16)


# -- what Python calls -----------------------------------------------------------------------------


@entry
def merge_piece(out, theta_0, dtype, start, stop, terms, steps, lambda_, rounding_key, buffers):
    """Merge the elements from ``start`` to ``stop``; return the bits of the largest magnitude.

    ``out`` and ``theta_0`` are addresses of tensors of a ``dtype``; ``start`` is a multiple of 4.
    ``terms`` is an array of a dtype in :data:`TERM`, and ``buffers`` are seven arrays of BLOCK
    numbers, the third of zeros; these and ``lambda_`` have the dtype of the arithmetic. ``steps``
    are ties, normalize, by_magnitude and rescale of a Job, and whether to round stochastically.
    """
    ties, normalize, by_magnitude, rescale, stochastic = steps
    base, delta, zeros, total, magnitudes, weights, votes = buffers
    words = np.empty(BLOCK // 4, U64)
    lanes = words.view(I16)
    largest = magnitude_bits(lambda_ * ZERO)
    for first in range(start, stop, BLOCK):
        n, step = min(BLOCK, stop - first), U64(first // 4) * GAMMA
        read(n, base, theta_0, dtype, first)
        total[:] = ZERO
        if ties:
            magnitudes[:] = ZERO
        if normalize:
            weights[:] = ZERO
            votes[:] = ZERO
        for k in range(terms.size):
            term = terms[k]
            draw(n, words, term.key + step)
            kept = I16(term.t - 1 - (1 << 15))  # the largest lane that is
            if not by_magnitude and not normalize:
                read_term(n, total, magnitudes, lanes, kept, term, first, base, ties)
                continue
            read(n, delta, term.theta, term.dtype, first)
            if by_magnitude:
                choose_by_magnitude(n, delta, lanes, base, term.c, F32(term.t), rescale)
                kept = I16(-1)
            else:
                subtract(n, delta, base)
            if normalize:
                add_weight(n, weights, votes, lanes, kept, delta, term.weight)
            accumulate(n, total, magnitudes, lanes, kept, delta, zeros, term.factor, ties)
        if normalize:
            elect_and_divide(n, total, magnitudes, weights, votes, lambda_)
        elif ties:
            elect(n, total, magnitudes, lambda_)
        if stochastic:
            largest = max(largest, add_base(n, total, total, base))
            draw(n, words, rounding_key + step)
            write_stochastically(n, total, out, dtype, first, lanes)
        else:
            largest = max(largest, write(n, total, base, out, dtype, first))
    return largest


@entry
def sum_blocks(address, sums):
    """Fill ``sums`` with those of the words of blocks of 32 KiB, which wrap around."""
    for block in range(sums.size):
        words = carray(pointer(address + U64(block * 8 * WORDS)), WORDS, np.int64)
        total = np.int64(0)
        for i in range(WORDS):
            total += words[i]
        sums[block] = total
