"""The formula of DARE: drop, rescale, combine, on one chunk of plain vectors.

In the notation of DARE (arXiv 2311.03099, section 3) and TIES (arXiv 2306.01708, section 3),
for base model theta_0 and fine-tuned models theta_k with weight w_k and density d_k = 1 - p_k,
element by element::

    delta_k = theta_k - theta_0                      in float32 (float64 for float64 inputs)
    m_k     ~ Bernoulli(pi_k)                        mergekit_dare.kernel.masks
    hat_k   = m_k * delta_k / pi_k                   without "/ pi_k" if rescale is false
    linear:   D = sum_k w_k hat_k                    normalize: / sum_k w_k
    ties:     s = sign(sum_k w_k hat_k), 0 counts as +
              D = sum of the w_k hat_k whose sign is s    normalize: / the sum of those w_k
    out     = theta_0 + lambda * D                   rounded once, to the dtype of theta_0

Uniform sampling, the paper's, has pi_k = d_k; sampling by magnitude has pi_k = T_k / 65536 with
T_k = min(65536, ceil(c_k |delta_k|)) (mergekit_dare.kernel.sampling).

A divisor of 0, or for linear under 1e-8, counts as 1, as in mergekit. An element that is
equal in both models has delta 0 even where it is infinite.

For TIES, the terms of sign s add up to sum + s * (sum of magnitudes - |sum|) / 2: what is in
brackets is twice what the others add up to. Likewise for their weights, where the terms' signs,
which are taken before anything is scaled, stand for the terms. So no term needs to be kept until s
is known.

Every operation rounds once, and a product that is added to something has a factor of 0, 1, -1 or a
half (but for lambda), so it is exact, and a fused multiply-add gives the same bits. So the result
is the same to the bit for every chunk size, number of threads and device, and whether torch runs
these operations one by one or compiles them (:mod:`mergekit_dare.kernel.compiled`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_dare.kernel.buffers import Buffers
from mergekit_dare.kernel.masks import LANE_VALUES, keep_mask, keep_masks, uniform_lanes
from mergekit_dare.kernel.rounding import RoundingBuffers, round_stochastically
from mergekit_dare.kernel.scalars import scalar


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
        by_magnitude: Keep deltas in proportion to their size, not all with one probability.
        rescale: Divide by the probability. With uniform sampling, that is in the factors.
        normalize: TIES only: divide by the weights of the elected terms.
        scale: TIES only: multiply by lambda. For linear, both are in the factors.
        stochastic: Round stochastically to the dtype of theta_0, which is narrower.
        equal_infinities: Make the delta of elements that are equal zero also where they are
            infinite; that takes time and is rarely needed.

    """

    combine: Combine
    dtype: torch.dtype
    by_magnitude: bool = False
    rescale: bool = True
    normalize: bool = False
    scale: bool = False
    stochastic: bool = False
    equal_infinities: bool = False


class Numbers(NamedTuple):
    """The numbers in the formula; of the lists, one for each model.

    Attributes:
        states: SplitMix64's state before the chunk's first word, signed 64 bits; after those of
            the models that of the rounding.
        thresholds: The least T: d_k in units of 1 / 65536, from 1 to 65536; by magnitude 1, or
            65536 for a model that keeps all.
        scales: c_k in units of 1 / 65536; by magnitude only.
        factors: w_k; with uniform sampling w_k / d_k, unless rescale is false; for linear also
            times lambda and divided by the sum of weights, which are the same for all elements
            there.
        weights: w_k.
        lambda_: Factor of the merged delta.

    """

    states: Sequence[int] | Tensor
    thresholds: Sequence[int] | Tensor
    scales: Sequence[float] | Tensor
    factors: Sequence[float] | Tensor
    weights: Sequence[float] | Tensor
    lambda_: float | Tensor

    def as_lists(self) -> tuple[list[int], list[float]]:
        """Return all integers and all floating-point numbers, of numbers that are no tensors."""
        integers, floats = [*self.states, *self.thresholds], [*self.scales, *self.factors]
        return integers, [*floats, *self.weights, self.lambda_]

    @classmethod
    def from_vectors(cls, integers: Tensor, floats: Tensor, models: int) -> Numbers:
        """Return the numbers for which :meth:`as_lists` returns the content of two vectors."""
        states, thresholds = integers.split([models + 1, models])
        scales, factors, weights, lambda_ = floats.split([models, models, models, 1])
        return cls(states, thresholds, scales, factors, weights, lambda_[0])


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
        The L2 norm of the result before it was rounded: a bound of all magnitudes, in a fraction
        of the time of a maximum of them.

    """
    base = theta_0 if theta_0.dtype == b.dtype else b.base.copy_(theta_0)
    masks = _masks_at_once(numbers, steps, b)
    for k, theta in enumerate(thetas):
        m, delta = sparsify(k, theta, theta_0, base, numbers, steps, b, masks)
        accumulate(k, m, delta, numbers, steps, b)
    merged = b.sum if steps.combine is Combine.LINEAR else _elected(b, steps, numbers.lambda_)
    result = _add(base, merged, out=out if out.dtype == b.dtype else b.delta)
    # Not by torch.dot: MKL would take several threads for it, whatever torch is set to.
    norm: Tensor = torch.linalg.vector_norm(result)
    if steps.stochastic:
        lanes = uniform_lanes(numbers.states[len(thetas)], b.mask, b.mask_buffers)
        views = RoundingBuffers(b.delta_bits, b.scratch, b.scratch_bits)
        round_stochastically(result, lanes, out, views, infinities=steps.equal_infinities)
    elif result is not out:
        out.copy_(result)
    return norm


def _masks_at_once(numbers: Numbers, steps: Steps, b: Buffers) -> Tensor | None:
    """Return every m_k if they are small, no model keeps all, and no delta plays a part."""
    states, ts = numbers.states, numbers.thresholds
    if b.masks is None or isinstance(states, Tensor) or isinstance(ts, Tensor):
        return None
    if steps.by_magnitude or max(ts) >= LANE_VALUES:
        return None
    return keep_masks(states[: len(ts)], ts, *b.masks)


def sparsify(
    k: int,
    theta: Tensor,
    theta_0: Tensor,
    base: Tensor,
    numbers: Numbers,
    steps: Steps,
    b: Buffers,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return m_k, of ``masks`` or else in ``b.mask``, and in ``b.delta`` delta_k.

    By magnitude, it is also divided by pi_k.
    """
    delta = _delta(theta, base, out=b.delta)
    if steps.equal_infinities:
        delta.masked_fill_(theta == theta_0, 0)
    if masks is not None:
        return masks[k], delta
    if not steps.by_magnitude:
        state, t = numbers.states[k], numbers.thresholds[k]
        narrow = torch.float16 if theta.dtype == torch.float16 else torch.bfloat16
        return keep_mask(state, t, b.mask, b.mask_buffers, narrow), delta
    t = probability_by_magnitude(k, delta, numbers, out=b.scratch)
    m = uniform_lanes(numbers.states[k], b.mask, b.mask_buffers).lt_(t)
    if steps.rescale:
        delta.div_(t.mul_(scalar(1 / LANE_VALUES, b.dtype)))
    return m, delta


def probability_by_magnitude(k: int, delta: Tensor, numbers: Numbers, *, out: Tensor) -> Tensor:
    """Return T_k = min(65536, ceil(c_k |delta_k|)) as floating-point numbers; at least 1."""
    t = torch.abs(delta, out=out).mul_(numbers.scales[k]).ceil_()
    return t.clamp_(min=numbers.thresholds[k]).clamp_(max=LANE_VALUES)


def accumulate(
    k: int, m: Tensor, delta: Tensor, numbers: Numbers, steps: Steps, b: Buffers
) -> None:
    """Add the term of a model, w_k hat_k, to the sums; ``delta`` is overwritten."""
    ties, first = steps.combine is Combine.TIES, k == 0
    if ties and steps.normalize:
        _accumulate_weights(b, m, delta, numbers.weights[k], first=first)
    x: Tensor = delta.mul_(scalar(numbers.factors[k], b.dtype))
    if ties:
        _accumulate_with_magnitudes(b, m, x, first=first)
    else:
        _accumulate(b.sum, m, x, first=first)


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


def _accumulate_weights(b: Buffers, m: Tensor, delta: Tensor, weight: Any, *, first: bool) -> None:
    """Add w_k where the term is not 0: |w_k| with the sign of delta_k, and w_k without."""
    signed = torch.sign(delta, out=b.scratch).mul_(scalar(abs(weight), b.dtype))
    _accumulate(b.signed_weights, m, signed, first=first)
    sign_of_weight = (weight >= 0) * 2 - 1
    _accumulate(b.weights, m, signed.abs_().mul_(scalar(sign_of_weight, b.dtype)), first=first)


def elected_sign(b: Buffers) -> Tensor:
    """Return s = sign(sum_k w_k hat_k) in ``b.mask``; 0 counts as +."""
    zero, one, two = (scalar(number, b.dtype) for number in (0, 1, 2))
    return torch.ge(b.sum, zero, out=b.mask).mul_(two).sub_(one)


def _elected(b: Buffers, steps: Steps, lambda_: float | Tensor) -> Tensor:
    """Return lambda D of TIES."""
    s = elected_sign(b)
    others_twice = b.magnitudes.sub_(torch.abs(b.sum, out=b.scratch))
    merged = b.sum.addcmul_(s, others_twice, value=0.5)
    if steps.normalize:
        merged.div_(elected_weights(b, s))
    return merged.mul_(scalar(lambda_, b.dtype)) if steps.scale else merged


def elected_weights(b: Buffers, s: Tensor) -> Tensor:
    """Return the sum of the w_k of the terms of sign s, or 1 where it is 0."""
    divisor = b.weights.addcmul_(s, b.signed_weights).mul_(scalar(0.5, b.dtype))
    # masked_fill_ would take seven times as long: torch is slow with bool tensors.
    return divisor.add_(torch.eq(divisor, scalar(0, b.dtype), out=b.scratch))


def _add(base: Tensor, merged: Tensor, *, out: Tensor) -> Tensor:
    """theta_0 + lambda D, and theta_0 where D is 0, though -0.0 + 0.0 is 0.0; overwrites D."""
    if torch.compiler.is_compiling():  # with flags that let a C++ compiler take 0 - x for -x
        return torch.add(base, merged.masked_fill_(merged == 0, -0.0), out=out)
    # 0 - x is never -0.0, and -0.0 - 0.0 is -0.0. Filling takes 20 times as long as subtracting.
    negative = torch.sub(scalar(0, merged.dtype), merged, out=merged)
    return torch.sub(base, negative, out=out)


SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name without ``torch.``."""
    return str(dtype).removeprefix("torch.")
