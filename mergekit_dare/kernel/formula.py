"""The formula of DARE: drop, rescale, combine.

In the notation of DARE (arXiv 2311.03099, section 3) and TIES (arXiv 2306.01708, section 3), for
base model theta_0 and fine-tuned models theta_k with weight w_k and density d_k = 1 - p_k, element
by element::

    delta_k = theta_k - theta_0                      in float32 (float64 for float64 inputs)
    m_k     ~ Bernoulli(pi_k)                        mergekit_dare.kernel.masks
    hat_k   = m_k * delta_k / pi_k                   without "/ pi_k" if rescale is false
    linear:   D = sum_k w_k hat_k                    normalize: / sum_k w_k
    ties:     s = sign(sum_k w_k hat_k), 0 counts as +
              D = sum of the w_k hat_k whose sign is s    normalize: / the sum of those w_k
    out     = theta_0 + lambda * D                   rounded once, to the dtype of theta_0

Uniform sampling, the paper's, has pi_k = d_k; sampling by magnitude has pi_k = T_k / 65536 with
T_k = min(65536, ceil(c_k |delta_k|)) (mergekit_dare.kernel.sampling).

A divisor of 0, or for linear under 1e-8, counts as 1, as in mergekit. An element that is equal in
both models has delta 0 even where it is infinite.

For TIES, the terms of sign s add up to sum + s * (sum of magnitudes - |sum|) / 2: the expression in
parentheses is twice what the others add up to. The same holds for their weights.

This module has it in torch, for accelerators, for derivatives, and for a CPU without Numba;
:mod:`mergekit_dare.kernel.loops` has the same steps as loops, for the CPU. Every operation rounds
once, and a product that is added to something has a factor of 0, 1, -1 or a half, so it is exact,
and a fused multiply-add gives the same bits. So both give the same result to the bit, for every
size of the pieces, number of threads and device.

Masks, signs and probabilities are constants for torch's autograd, as comparisons, ``sign`` and
``ceil`` have derivative 0. So derivatives of every order go through the same mask as the merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_dare.kernel.masks import LANE_VALUES, lanes_of, largest_lane

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Combine(Enum):
    """How the sparsified deltas of several models become one."""

    LINEAR = "linear"
    TIES = "ties"


class Term(NamedTuple):
    """One w_k hat_k of the sum, ready to be computed.

    Attributes:
        name: The model's, for error messages.
        model: The model's index among those that were given.
        theta: theta_k as a contiguous vector.
        key: The key of m_k.
        t: d_k in units of 1 / 65536, from 1 to 65536; by magnitude the least T_k.
        c: c_k in units of 1 / 65536; by magnitude only.
        factor: w_k, with uniform sampling divided by d_k unless rescale is false; for linear also
            times lambda and divided by the sum of weights.
        weight: w_k; for a normalized TIES merge in units in which the largest is about 1.

    """

    name: str
    model: int
    theta: Tensor
    key: int
    t: int
    c: float
    factor: float
    weight: float


class Job(NamedTuple):
    """One tensor's merge, ready to be computed.

    Attributes:
        theta_0: The base model's elements as a contiguous vector.
        terms: Those that are not all zeros, in an order that does not depend on the models'.
        dtype: That of all arithmetic.
        ties: Elect signs.
        normalize: TIES only: divide by the weights of the elected terms.
        by_magnitude: Keep deltas in proportion to their size, not all with one probability.
        rescale: Divide by the probability. With uniform sampling, the factors include that.
        lambda_: Factor of the merged delta; for linear 1, as the factors include it.
        rounding_key: The key of the stream that rounds the result; None to round to nearest.

    """

    theta_0: Tensor
    terms: Sequence[Term]
    dtype: torch.dtype
    ties: bool
    normalize: bool
    by_magnitude: bool
    rescale: bool
    lambda_: float
    rounding_key: int | None


def merge(job: Job, piece: slice) -> Tensor:
    """Return theta_0 + lambda D, not yet rounded.

    ``piece`` begins at a multiple of 4; the result is a vector of dtype ``job.dtype``.
    """
    theta_0 = job.theta_0[piece].to(job.dtype)
    total = magnitudes = votes = weights = torch.zeros_like(theta_0)
    for term in job.terms:
        m, delta = sparsify(term, theta_0, piece, job)
        hat = delta * term.factor * m
        if job.ties:
            sign = hat.sign()
            magnitude = sign * hat
            magnitudes = magnitudes + magnitude
            hat = sign * magnitude  # the same, except that where it is 0, so is its derivative
        if job.normalize:
            vote = delta.sign() * m
            votes, weights = votes + vote * abs(term.weight), weights + vote.abs() * term.weight
        total = total + hat
    if job.ties:
        s = torch.where(total >= 0, 1.0, -1.0).to(job.dtype)
        total = total + s * (magnitudes - s * total) * 0.5
        if job.normalize:
            elected = (weights + s * votes) * 0.5
            total = total / (elected + (elected == 0))
    return theta_0 - (0 - job.lambda_ * total)  # 0 - x is never -0.0: theta_0 stays where D is 0


def sparsify(term: Term, theta_0: Tensor, piece: slice, job: Job) -> tuple[Tensor, Tensor]:
    """Return m_k and delta_k, which by magnitude is divided by pi_k."""
    theta = term.theta[piece].to(job.dtype)
    delta = torch.where((theta == theta_0) & theta.isinf(), 0, theta - theta_0)
    lanes = lanes_of(term.key, piece, theta_0.device)
    if not job.by_magnitude:
        return (lanes <= largest_lane(term.t)).to(job.dtype), delta
    t = (delta.abs() * term.c).ceil().clamp(term.t, LANE_VALUES)
    m = (lanes.to(job.dtype) + LANE_VALUES / 2 < t).to(job.dtype)
    return m, delta / (t / LANE_VALUES) if job.rescale else delta


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name without ``torch.``."""
    return str(dtype).removeprefix("torch.")
