"""The formula of DARE: drop, rescale, combine, on one chunk of plain vectors.

In the notation of DARE (arXiv 2311.03099, section 3) and TIES (arXiv 2306.01708, section 3),
for base model theta_0 and fine-tuned models theta_k with weight w_k and density d_k = 1 - p_k,
element by element::

    delta_k = theta_k - theta_0                      in float32 (float64 for float64 inputs)
    m_k     ~ Bernoulli(d_k)                         mergekit_dare.kernel.masks
    hat_k   = m_k * delta_k / d_k                    without "/ d_k" if rescale is false
    linear:   D = sum_k w_k hat_k                    normalize: / sum_k w_k
    ties:     s = sign(sum_k w_k hat_k), 0 counts as +
              D = sum of the w_k hat_k whose sign is s    normalize: / the sum of those w_k
    out     = theta_0 + lambda * D                   rounded once, to the dtype of theta_0

A divisor of 0, or for linear under 1e-8, counts as 1, as in mergekit. An element that is
equal in both models has delta 0 even where it is infinite.

For TIES, with s the sign of the sum, the terms of sign s add up to (sum + s * sum of magnitudes)
/ 2, and likewise their weights, so no term needs to be kept until s is known. Both summands have
the sign s, so nothing cancels.

Every operation rounds once, and a product that is added to something has a factor of 0, 1 or -1
(but for lambda), so it is exact, and a fused multiply-add gives the same bits. So the result is the
same to the bit for every chunk size, number of threads and device, and whether torch runs these
operations one by one or compiles them (:mod:`mergekit_dare.kernel.compiled`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_dare.kernel.buffers import Buffers, chunks
from mergekit_dare.kernel.masks import keep_mask, state_before


class Combine(Enum):
    """How the sparsified deltas of several models become one."""

    LINEAR = "linear"
    TIES = "ties"


@dataclass(frozen=True)
class Steps:
    """What is done to every chunk of a tensor.

    Attributes:
        combine: DARE-linear or DARE-TIES.
        dtype: The dtype of all arithmetic.
        normalize: TIES only: divide by the weights of the elected terms.
        scale: TIES only: multiply by lambda. For linear, both are in the factors.
        equal_infinities: Make the delta of elements that are equal zero also where they are
            infinite; that takes time and is rarely needed.

    """

    combine: Combine
    dtype: torch.dtype
    normalize: bool = False
    scale: bool = False
    equal_infinities: bool = False


class Numbers(NamedTuple):
    """The numbers in the formula; of the lists, one for each model.

    For TIES, factors and weights are halved: that is its "/ 2".

    Attributes:
        states: SplitMix64's state before the chunk's first word, signed 64 bits.
        thresholds: d_k in units of 1 / 65536, from 1 to 65536.
        factors: w_k / d_k, or w_k if rescale is false; for linear also times lambda and
            divided by the sum of weights, which are the same for all elements there.
        weights: w_k.
        lambda_: Factor of the merged delta.

    """

    states: Sequence[int] | Tensor
    thresholds: Sequence[int] | Tensor
    factors: Sequence[float] | Tensor
    weights: Sequence[float] | Tensor
    lambda_: float | Tensor


def merge_chunk(
    out: Tensor,
    theta_0: Tensor,
    thetas: Sequence[Tensor],
    numbers: Numbers,
    steps: Steps,
    b: Buffers,
) -> Tensor:
    """Write one merged chunk.

    Args:
        out: Shape (b.capacity,): becomes theta_0 + lambda * D.
        theta_0: The base model's chunk: shape and dtype of ``out``.
        thetas: The fine-tuned models' chunks, one or more, of this shape.
        numbers: Their numbers, in the same order.
        steps: What is done.
        b: Scratch space; overwritten.

    Returns:
        The sum of the squares of the result before it was rounded: a bound of all magnitudes, in a
        fifth of the time of a maximum.

    """
    base = theta_0 if theta_0.dtype == b.dtype else b.base.copy_(theta_0)
    for k, theta in enumerate(thetas):
        delta = _delta(theta, base, out=b.delta)
        if steps.equal_infinities:
            delta.masked_fill_(theta == theta_0, 0)
        m = keep_mask(numbers.states[k], numbers.thresholds[k], b.mask, b.mask_buffers)
        x = delta.mul_(numbers.factors[k])
        if steps.combine is Combine.LINEAR:
            _accumulate(b.sum, m, x, first=k == 0)
        else:
            if steps.normalize:
                _accumulate_weights(b, m, x, numbers.weights[k], first=k == 0)
            _accumulate_with_magnitudes(b, m, x, first=k == 0)
    merged = b.sum if steps.combine is Combine.LINEAR else _elected(b, steps, numbers.lambda_)
    if torch.compiler.is_compiling() or _has_negative_zeros(theta_0):
        merged.masked_fill_(merged == 0, -0.0)  # x + -0.0 is x, but -0.0 + 0.0 is 0.0
    result = torch.add(base, merged, out=out if out.dtype == b.dtype else b.delta)
    if result is not out:
        out.copy_(result)
    return torch.dot(result, result)


def merge_chunks(
    out: Tensor,
    theta_0: Tensor,
    thetas: Sequence[Tensor],
    keys: Sequence[int],
    numbers: Numbers,
    steps: Steps,
    *,
    start: int = 0,
) -> Tensor | None:
    """Merge vectors of any size, chunk by chunk.

    Args:
        out: Shape (elements,): the merged elements are written.
        theta_0: The base model: shape and dtype of ``out``.
        thetas: The fine-tuned models, one or more, of this shape.
        keys: The keys of their masks.
        numbers: Their numbers, without states.
        steps: What is done.
        start: Index of the first element to merge, a multiple of 4.

    Returns:
        Shape (): the largest chunk's sum of squares, as from :func:`merge_chunk`; ``None`` if
        there was no chunk to merge.

    """
    buffers = Buffers.of_this_thread(theta_0.device, steps.dtype)
    square_sums: list[Tensor] = []
    for first, (out_chunk, base_chunk, *theta_chunks) in chunks(
        buffers.capacity, out, theta_0, *thetas, start=start
    ):
        numbers = numbers._replace(states=[state_before(key, first) for key in keys])
        b = buffers.first(out_chunk.numel())
        square_sums.append(merge_chunk(out_chunk, base_chunk, theta_chunks, numbers, steps, b))
    return torch.stack(square_sums).max() if square_sums else None


def _delta(theta: Tensor, base: Tensor, *, out: Tensor) -> Tensor:
    """delta_k = theta_k - theta_0."""
    if theta.dtype == out.dtype:
        return torch.sub(theta, base, out=out)
    return out.copy_(theta).sub_(base)


def _accumulate(total: Tensor, m: Tensor, x: Tensor, *, first: bool) -> None:
    """Add m_k x_k to the sum, or start the sum with it."""
    if first:
        torch.mul(m, x, out=total)
    else:
        total.addcmul_(m, x)


def _accumulate_with_magnitudes(b: Buffers, m: Tensor, x: Tensor, *, first: bool) -> None:
    """Add w_k hat_k = m_k x_k to the sum, and its magnitude to that of the magnitudes."""
    if first:
        torch.mul(m, x, out=b.sum)
        torch.abs(b.sum, out=b.magnitudes)
    else:  # the masked term serves twice, so it pays to write it
        b.sum.add_(x.mul_(m))
        b.magnitudes.add_(x.abs_())


def _accumulate_weights(
    b: Buffers, m: Tensor, x: Tensor, weight: float | Tensor, *, first: bool
) -> None:
    """Add w_k where the term is not 0, with the sign of the term and without."""
    signed = torch.sign(x, out=b.scratch).mul_(weight)
    _accumulate(b.signed_weights, m, signed, first=first)
    _accumulate(b.weights, m, signed.abs_().copysign_(weight), first=first)


def _elected(b: Buffers, steps: Steps, lambda_: float | Tensor) -> Tensor:
    """Return lambda D of TIES."""
    s = torch.copysign(_ONE, b.sum, out=b.mask)  # the sum is never -0 unless every term is 0
    merged = b.sum.addcmul_(s, b.magnitudes)
    if steps.normalize:
        divisor = b.weights.addcmul_(s, b.signed_weights)
        merged.div_(divisor.masked_fill_(divisor == 0, 1))
    return merged.mul_(lambda_) if steps.scale else merged


_ONE = torch.tensor(1.0, device="cpu")


# The integers of a float's width, and the one that has but its sign bit set: -0.0, the least.
_INTEGERS = {
    dtype: (integer, torch.iinfo(integer).min)
    for dtype, integer in (
        (torch.bfloat16, torch.int16),
        (torch.float16, torch.int16),
        (torch.float32, torch.int32),
        (torch.float64, torch.int64),
    )
}
SUPPORTED_DTYPES = tuple(_INTEGERS)


def _has_negative_zeros(theta_0: Tensor) -> bool:
    integer, negative_zero = _INTEGERS[theta_0.dtype]
    return int(theta_0.view(integer).min()) == negative_zero
