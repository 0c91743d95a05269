"""Streaming statistics of deltas.

Every given element is counted; beyond the tensors, memory is that of a few chunks. Figures of an
excerpt are scaled to the whole tensor.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_CHUNK = 1 << 19
# The magnitude's bin is its float32 without the low 16 bits: 128 bins for each power of two, so
# that a bin is at most 0.8 % wide.
_BIN_SHIFT = 16
_BINS = 1 << (31 - _BIN_SHIFT)


@dataclass(frozen=True, eq=False)
class ChunkDeltas:
    """One model's deltas in a chunk, in the forms that several figures are computed from.

    Attributes:
        delta: float32, or float64 for float64 models, shape (elements,).
        wide: The same in float64.
        signs: float32: -1, 0 or 1.
        square_sum: Sum of the squares.
        finite: bool: which deltas are finite; ``None`` if all are.

    """

    delta: Tensor
    wide: Tensor
    signs: Tensor
    square_sum: float
    finite: Tensor | None = None

    @classmethod
    def between(cls, theta: Tensor, base: Tensor) -> ChunkDeltas:
        """Return theta - base, which is 0 where both are equal, also where they are infinite."""
        work = torch.promote_types(torch.promote_types(theta.dtype, base.dtype), torch.float32)
        delta = theta.to(work) - base.to(work)
        made = cls._of(delta)
        if math.isfinite(made.square_sum):
            return made
        delta.masked_fill_(theta == base, 0)
        finite = torch.isfinite(delta)
        return cls._of(delta, None if bool(finite.all()) else finite)

    @classmethod
    def _of(cls, delta: Tensor, finite: Tensor | None = None) -> ChunkDeltas:
        wide = delta.double()
        return cls(delta, wide, delta.sign().float(), float(torch.dot(wide, wide)), finite)

    def only(self, kept: Tensor) -> ChunkDeltas:
        """Return the deltas where ``kept`` is true, all of which are finite."""
        return self._of(self.delta[kept])


# The histogram of statistics that have not counted anything; never modified.
_EMPTY = torch.zeros(_BINS, dtype=torch.float64)


@dataclass
class DeltaStatistics:
    """What is known about one model's deltas, in one tensor or in all that were added.

    Attributes:
        count: Number of elements.
        smallest: Least delta.
        largest: Greatest delta.
        magnitude_sum: Sum of |delta|.
        square_sum: Sum of delta squared.
        base_square_sum: Sum of the base's squared elements.
        dot_base: Sum of delta times base.
        zeros: Number of deltas that are exactly 0.
        non_finite: Number of deltas that are NaN or infinite; no other figure includes them.
        histogram: Number of |delta| in each bin; see :func:`bin_edges`.

    """

    count: int = 0
    smallest: float = math.inf
    largest: float = -math.inf
    magnitude_sum: float = 0.0
    square_sum: float = 0.0
    base_square_sum: float = 0.0
    dot_base: float = 0.0
    zeros: int = 0
    non_finite: int = 0
    histogram: Tensor = field(default_factory=lambda: _EMPTY)

    def add_chunk(self, deltas: ChunkDeltas, base: Tensor, base_square_sum: float) -> None:
        """Count the deltas of a chunk.

        Args:
            deltas: The chunk's.
            base: The base's elements, float64.
            base_square_sum: Sum of their squares.

        """
        if deltas.finite is not None:
            self.non_finite += int((~deltas.finite).sum())
            deltas, base = deltas.only(deltas.finite), base[deltas.finite]
            base_square_sum = float(torch.dot(base, base))
        if deltas.delta.numel() == 0:
            return
        low, high = torch.aminmax(deltas.delta)
        self.count += deltas.delta.numel()
        self.smallest = min(self.smallest, float(low))
        self.largest = max(self.largest, float(high))
        self.square_sum += deltas.square_sum
        self.base_square_sum += base_square_sum
        self.dot_base += float(torch.dot(deltas.wide, base))
        # The signs' sums are whole numbers under 2**24: exact in float32, in any order.
        self.zeros += deltas.delta.numel() - int(torch.dot(deltas.signs, deltas.signs))
        magnitude = deltas.delta.float().abs()
        self.magnitude_sum += float(magnitude.sum(dtype=torch.float64))
        bins = magnitude.view(torch.int32).bitwise_right_shift_(_BIN_SHIFT)
        self._add_histogram(torch.bincount(bins, minlength=_BINS).double().cpu())

    def add(self, other: DeltaStatistics, factor: float = 1.0) -> None:
        """Count all that ``other`` has counted.

        Args:
            other: Of another tensor, or of an excerpt.
            factor: The tensor's number of elements over that of its excerpt.

        """
        self.count += round(other.count * factor)
        self.smallest = min(self.smallest, other.smallest)
        self.largest = max(self.largest, other.largest)
        self.magnitude_sum += other.magnitude_sum * factor
        self.square_sum += other.square_sum * factor
        self.base_square_sum += other.base_square_sum * factor
        self.dot_base += other.dot_base * factor
        self.zeros += round(other.zeros * factor)
        self.non_finite += math.ceil(other.non_finite * factor)
        if other.histogram is not _EMPTY:
            self._add_histogram(other.histogram, factor)

    def _add_histogram(self, counts: Tensor, factor: float = 1.0) -> None:
        if self.histogram is _EMPTY:
            self.histogram = counts * factor
        else:
            self.histogram.add_(counts, alpha=factor)

    @property
    def mean_magnitude(self) -> float:
        """Mean of |delta|."""
        return self.magnitude_sum / max(1, self.count)

    @property
    def relative_norm(self) -> float:
        """L2 norm of the deltas over that of the base; infinite for a base of zeros."""
        if self.base_square_sum == 0:
            return math.inf if self.square_sum else 0.0
        return math.sqrt(self.square_sum / self.base_square_sum)

    @property
    def undoing(self) -> float:
        """How much of the deltas cancels the base: 0 for none, 1 for an unrelated model.

        For a theta_k of equal norm, unrelated to theta_0, delta = theta_k - theta_0 has the product
        -|theta_0|**2 with theta_0, and the square |theta_k|**2 + |theta_0|**2.
        """
        return -2 * self.dot_base / self.square_sum if self.square_sum else 0.0

    @property
    def zero_share(self) -> float:
        """Fraction of the deltas that are exactly 0."""
        return self.zeros / max(1, self.count)

    def share_above(self, magnitude: float) -> float:
        """Fraction of |delta| above ``magnitude``, to within the bin that it is in."""
        bits = torch.tensor(magnitude, dtype=torch.float32).view(torch.int32)
        first = (int(bits) >> _BIN_SHIFT) + 1
        return float(self.histogram[first:].sum()) / max(1, self.count)

    def quantile(self, fraction: float) -> float:
        """Return the |delta| that ``fraction`` of the deltas do not exceed, exact to 0.4 %."""
        if self.count == 0:
            return math.nan
        # in an excerpt, counts are not whole numbers
        rank = min(max(1, math.ceil(fraction * self.count)), float(self.histogram.sum()))
        index = int(torch.searchsorted(self.histogram.cumsum(0), rank))
        edges = bin_edges()
        return 0.0 if index == 0 else float(edges[index] + edges[index + 1]) / 2


@functools.cache
def bin_edges() -> Tensor:
    """Return the lower edges of the histogram's bins and the last one's upper edge.

    float64, shape (bins + 1,). The first bin holds 0 and its neighborhood (below 1e-40).
    """
    bits = torch.arange(_BINS, dtype=torch.int32) << _BIN_SHIFT
    edges = bits.view(torch.float32).double()
    return torch.cat([edges, torch.tensor([math.inf], dtype=torch.float64)])


@dataclass
class PairStatistics:
    """How the deltas of two models relate.

    Attributes:
        dot: Sum of the products of the two deltas.
        square_sums: Sum of the squares of the first, and of the second.
        count: Number of elements.
        both: Number of elements that both models change.
        conflicts: Number of those that they change in opposite directions.

    """

    dot: float = 0.0
    square_sums: tuple[float, float] = (0.0, 0.0)
    count: int = 0
    both: int = 0
    conflicts: int = 0

    def add_chunk(self, first: ChunkDeltas, second: ChunkDeltas) -> None:
        """Count the deltas of a chunk, except where either is not finite."""
        if first.finite is not None or second.finite is not None:
            finite = torch.isfinite(first.delta) & torch.isfinite(second.delta)
            first, second = first.only(finite), second.only(finite)
        agreeing_less_conflicts = int(torch.dot(first.signs, second.signs))
        both = int(torch.dot(first.signs.abs(), second.signs.abs()))
        self.add(
            PairStatistics(
                dot=float(torch.dot(first.wide, second.wide)),
                square_sums=(first.square_sum, second.square_sum),
                count=first.delta.numel(),
                both=both,
                conflicts=(both - agreeing_less_conflicts) // 2,
            )
        )

    def add(self, other: PairStatistics, factor: float = 1.0) -> None:
        """Count all that ``other`` has counted, ``factor`` times."""
        self.dot += other.dot * factor
        (a, b), (c, d) = self.square_sums, other.square_sums
        self.square_sums = (a + c * factor, b + d * factor)
        self.count += round(other.count * factor)
        self.both += round(other.both * factor)
        self.conflicts += round(other.conflicts * factor)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two models' deltas."""
        length = math.sqrt(self.square_sums[0]) * math.sqrt(self.square_sums[1])
        return self.dot / length if length else 0.0

    @property
    def both_share(self) -> float:
        """Fraction of the elements that both models change."""
        return self.both / max(1, self.count)

    @property
    def conflict_share(self) -> float:
        """Of the elements that both models change, the fraction changed in opposite directions."""
        return self.conflicts / max(1, self.both)


@dataclass
class TensorStatistics:
    """Statistics of one tensor: each model's, and each pair's."""

    models: dict[str, DeltaStatistics]
    pairs: dict[tuple[str, str], PairStatistics]


def measure(base: Tensor, fine_tuned: Mapping[str, Tensor]) -> TensorStatistics:
    """Measure the deltas of one tensor.

    Args:
        base: Any shape and floating-point dtype.
        fine_tuned: The tensor of each model, of the base's shape and device.

    Returns:
        Statistics by model and by pair of models.

    """
    models = {name: DeltaStatistics() for name in fine_tuned}
    pairs = {pair: PairStatistics() for pair in itertools.combinations(fine_tuned, 2)}
    vectors = [base.detach().reshape(-1), *(t.detach().reshape(-1) for t in fine_tuned.values())]
    for base_chunk, *chunks in _chunks(vectors):
        wide = base_chunk.double()
        square_sum = float(torch.dot(wide, wide))
        if not math.isfinite(square_sum):  # as in a causal mask, which every model has
            wide = torch.where(torch.isfinite(wide), wide, 0)
            square_sum = float(torch.dot(wide, wide))
        deltas = {
            name: ChunkDeltas.between(chunk, base_chunk)
            for name, chunk in zip(fine_tuned, chunks, strict=True)
        }
        for name, of_model in deltas.items():
            models[name].add_chunk(of_model, wide, square_sum)
        for (first, second), pair in pairs.items():
            pair.add_chunk(deltas[first], deltas[second])
    return TensorStatistics(models, pairs)


def _chunks(vectors: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(vector, _CHUNK) for vector in vectors), strict=True)


def noise_factor(density: float) -> float:
    """Return the standard deviation of a dropped and rescaled delta over the delta itself.

    hat = m delta / d has the variance delta**2 (1 - d) / d. Infinite for density 0.
    """
    return math.inf if density <= 0 else math.sqrt((1 - density) / density)


def magnitude_noise(statistics: DeltaStatistics, density: float) -> float:
    """Return the sum of the variances that sampling by magnitude gives the deltas.

    With pi = min(1, c |delta|), it is the sum of |delta| / c - delta**2 over those with pi < 1. It
    is computed from the histogram, so it is exact to 1 %.
    """
    edges = bin_edges()
    used = torch.nonzero(statistics.histogram[1:]).flatten().flip(0) + 1  # the largest first
    counts = statistics.histogram[used].double()
    sizes = (edges[used] + edges[used + 1]) / 2
    wanted = density * statistics.count
    if density <= 0:
        return math.inf
    if float(counts.sum()) <= wanted or not len(used):
        return 0.0
    # With the k largest bins always kept, c distributes the rest among the others.
    certain = counts.cumsum(0) - counts
    rest = (counts * sizes).flip(0).cumsum(0).flip(0)
    c = (wanted - certain) / rest
    first = int(torch.nonzero((c * sizes <= 1) & (c > 0))[0])
    counts, sizes = counts[first:], sizes[first:]
    return float((counts * (sizes / c[first] - sizes**2)).sum().clamp(min=0))
