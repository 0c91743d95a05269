"""Which deltas are kept: each with the same probability, or each in proportion to its size.

Keeping delta_i with probability pi_i and dividing it by pi_i is unbiased for every pi_i > 0, and
adds noise of the power sum delta_i**2 (1 / pi_i - 1). DARE takes pi_i = d for all. For the same
number of kept deltas the noise is least for

    pi_i = min(1, c |delta_i|)      c such that the mean of pi is the density d

(the Horvitz-Thompson estimator with probabilities in proportion to size; Wangni et al., arXiv
1710.09854, section 3, for gradients). In units of 1 / 65536, as masks have them, rounded up, so
that no delta but 0 has probability 0:

    T_i = min(65536, ceil(c |delta_i| 65536))

This module finds c. It is the same on every machine, since it is computed only from sums of whole
numbers, in any order: the T_i for a trial c. Large tensors are judged by an excerpt of their
elements, which is enlarged until it is exact enough; the elements are the same in every run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from mergekit_dare.kernel.masks import LANE_VALUES, splitmix64

# Adjacent elements that are taken together: so few that the excerpt is as good as one of single
# elements, so many that sampling costs little.
BLOCK = 16
# Elements in each excerpt; after the last one comes the whole tensor.
EXCERPTS = (1 << 12, 1 << 17, 1 << 20)
# An excerpt suffices if its standard error, as a fraction of the density, is at most this: then the
# actual density is within 1 % of the requested one, except for one tensor in 10,000.
STANDARD_ERROR = 0.0025
# c is found when the density of the excerpt is this close to the requested one.
TOLERANCE = 0.0005

_PIECE = 1 << 18  # elements of a whole tensor that are processed together
_MOST_STEPS = 60
_FINE = 1 << 24
# A greater c needs float64.
GREATEST_FOR_FLOAT32 = 2.0**100
_POSITIONS_KEY = 0x6D65726765  # any number will do


class Sampling(Enum):
    """How the probability of keeping a delta depends on the delta."""

    UNIFORM = "uniform"
    MAGNITUDE = "magnitude"


def magnitude_scale(
    theta: Tensor, theta_0: Tensor, density: float, dtype: torch.dtype
) -> float | None:
    """Return c in units of 1 / 65536, so that T = ceil(c |delta|), at most 65536.

    The mean of T / 65536 is within 1 % of the density for tensors of 65,536 elements and more, and
    within 10 % where one element in a thousand differs from 0; in a smaller tensor, as close as its
    few elements allow. No delta is certain to be dropped, so densities of few units are exceeded.

    Args:
        theta: theta_k: shape (elements,).
        theta_0: The base model's elements: shape (elements,).
        density: The fraction of deltas to keep, above 0.
        dtype: That of the arithmetic: float32 or float64.

    Returns:
        c, above 0; ``None`` where no more than density * elements deltas differ from 0, so that
        all can be kept.

    """
    elements = theta.numel()
    if density >= 1 or elements == 0:
        return None
    scale = 0.0
    for size in EXCERPTS:
        if size * 2 > elements:
            break
        blocks = _MagnitudeSums([_excerpt_of_deltas(theta, theta_0, dtype, size)])
        if blocks.nonzero <= 1.5 * density * blocks.elements:  # all may have to be kept: count them
            continue
        scale = blocks.solve(density, scale)
        if blocks.standard_error(scale) <= STANDARD_ERROR * density:
            return scale
    parts = _Parts(theta, theta_0, dtype)
    whole = _MagnitudeSums(list(parts) if elements <= _PIECE else parts)
    if whole.nonzero <= density * elements:
        return None
    return whole.solve(density, scale)


@dataclass(frozen=True, eq=False)
class _Parts:
    """|delta| of a whole tensor, part by part, computed each time that it is iterated over."""

    theta: Tensor
    theta_0: Tensor
    dtype: torch.dtype

    def __iter__(self) -> Iterator[Tensor]:
        pairs = zip(self.theta.split(_PIECE), self.theta_0.split(_PIECE), strict=True)
        return (_magnitudes(theta, theta_0, self.dtype) for theta, theta_0 in pairs)


class _MagnitudeSums:
    """Magnitudes of deltas, and how their T add up for a given c."""

    def __init__(self, pieces: Iterable[Tensor]) -> None:
        self.pieces = pieces
        self.elements = self.nonzero = 0
        self.largest = 0.0
        for magnitudes in pieces:
            self.elements += magnitudes.numel()
            self.nonzero += int(torch.count_nonzero(magnitudes))
            self.largest = max(self.largest, float(magnitudes.max()))

    def solve(self, density: float, scale: float) -> float:
        """Return the c at which the mean of T / 65536 is the density.

        T of the largest deltas stays 65536, so the others have to make up for it: c grows or
        shrinks by the factor that their sum needs. ``scale`` is where to start; 0 if unknown.
        """
        wanted = density * self.elements * LANE_VALUES
        if not scale:
            # With so small a unit, the T add up to what c |delta| does.
            unit = _FINE / self.largest
            scale = unit * wanted / self._sum(unit, _FINE)
        for _ in range(_MOST_STEPS):
            total = self._sum(scale, LANE_VALUES)
            if abs(total - wanted) <= TOLERANCE * wanted:
                break
            capped = self._capped(scale) * LANE_VALUES
            if wanted <= capped:  # too many are capped: come back from below
                factor = 0.5
            elif total > capped:
                factor = (wanted - capped) / (total - capped)
            else:
                break
            if scale * factor in (scale, 0.0, math.inf):
                break
            scale *= factor
        return scale

    def _sum(self, scale: float, most: int) -> int:
        """Return the sum of all T, each at most ``most``."""
        # Sums of whole numbers are exact in float64 up to 2**53, in whatever order they are added.
        return sum(int(self._t(m, scale, most).sum(dtype=torch.float64)) for m in self.pieces)

    def _capped(self, scale: float) -> int:
        """Return how many T are 65536."""
        if self.largest * scale < LANE_VALUES - 1:
            return 0
        return sum(
            int(torch.count_nonzero(self._t(m, scale, LANE_VALUES) == LANE_VALUES))
            for m in self.pieces
        )

    def _t(self, magnitudes: Tensor, scale: float, most: int) -> Tensor:
        if scale > GREATEST_FOR_FLOAT32:
            magnitudes = magnitudes.double()
        t = (magnitudes * scale).ceil_()
        return t if self.largest * scale < most - 1 else t.clamp_(max=most)

    def standard_error(self, scale: float) -> float:
        """Return that of the mean of T / 65536, judged by how its blocks differ."""
        (magnitudes,) = self.pieces
        sums = self._t(magnitudes, scale, LANE_VALUES).view(-1, BLOCK).sum(1).long()
        count, total = sums.numel(), int(sums.sum())
        square_sum = int((sums * sums).sum())
        variance = max(0, count * square_sum - total * total) / (count * count)
        return math.sqrt(variance / count) / BLOCK / LANE_VALUES


def _magnitudes(theta: Tensor, theta_0: Tensor, dtype: torch.dtype) -> Tensor:
    delta = theta.to(dtype) - theta_0.to(dtype)
    # Elements that are infinite in both models have delta 0; other such deltas are an error later.
    return delta.abs_().nan_to_num_(0.0, 0.0)


def _excerpt_of_deltas(theta: Tensor, theta_0: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """Return |delta| of evenly spaced blocks, each shifted at random within its share.

    Without the shift, the blocks could fall into step with the rows of a matrix.
    """
    count = size // BLOCK
    share = theta.numel() // count
    shifts = splitmix64(_POSITIONS_KEY, slice(0, count), theta.device) & (1 << 62) - 1
    starts = torch.arange(count, dtype=torch.int64, device=theta.device) * share
    starts += shifts % (share - BLOCK + 1)
    rows = (theta.numel() - BLOCK + 1, BLOCK)
    of_theta, of_base = (
        vector.as_strided(rows, (1, 1), vector.storage_offset()).index_select(0, starts).view(-1)
        for vector in (theta, theta_0)
    )
    return _magnitudes(of_theta, of_base, dtype)
