"""The formula of DARE: drop, rescale, combine, on plain tensors.

In the notation of DARE (arXiv 2311.03099, section 3) and TIES (arXiv 2306.01708, section 3),
for base model theta_0 and fine-tuned models theta_k with weight w_k and density d_k = 1 - p_k,
element by element::

    delta_k = theta_k - theta_0                      in float32 (float64 for float64 inputs)
    m_k     ~ Bernoulli(d_k)                         mergekit_dare.masks
    hat_k   = m_k * delta_k / d_k                    without "/ d_k" if rescale is false
    linear:   D = sum_k w_k hat_k                    normalize: / sum_k w_k
    ties:     s = sign(sum_k w_k hat_k), 0 counts as +
              D = sum of the w_k hat_k whose sign is s    normalize: / the sum of those w_k
    out     = theta_0 + lambda * D                   rounded once, to the dtype of theta_0

A divisor of 0, or for linear under 1e-8, counts as 1, as in mergekit. An element that is
equal in both models has delta 0 even where it is infinite.

The tensors are worked through in chunks, so that memory stays small whatever their size. Every
operation is a single rounding that no compiler may fuse with another, so that the result is
the same to the bit for every chunk size, number of threads and device.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from mergekit_dare.masks import LANE_VALUES, MaskBuffers, keep_mask, mask_key, threshold

# Elements in a chunk. A smaller one wastes time on calls (and torch gives a core no fewer than
# 2**15 words of the mask, which are 2**17 elements), a larger one does not stay in a core's own
# cache. An accelerator needs enough elements to be busy. The largest chunk takes 40 MB of buffers
# on a CPU, 170 MB on an accelerator.
CPU_CHUNK_PER_THREAD, LARGEST_CPU_CHUNK = 1 << 17, 1 << 20
ACCELERATOR_CHUNK = 1 << 22

_SMALLEST_LINEAR_DIVISOR = 1e-8


class Combine(Enum):
    """How the sparsified deltas of several models become one."""

    LINEAR = "linear"
    TIES = "ties"


@dataclass(frozen=True, eq=False)
class FineTuned:
    """One fine-tuned model's share in a merged tensor.

    Attributes:
        name: The model's name, for error messages only.
        tensor: theta_k: shape and device of the base tensor.
        weight: w_k, any finite number.
        density: d_k, the fraction of deltas to keep, from 0 to 1.

    """

    name: str
    tensor: Tensor
    weight: float
    density: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """What is the same for all models that go into a merged tensor.

    Attributes:
        combine: DARE-linear or DARE-TIES.
        tensor_name: The output tensor's name: a part of the masks' key.
        seed: Any integer: a part of the masks' key.
        normalize: Divide by the sum of the weights.
        rescale: Divide the kept deltas by the density.
        lambda_: Factor of the merged delta.

    """

    combine: Combine
    tensor_name: str
    seed: int
    normalize: bool = False
    rescale: bool = True
    lambda_: float = 1.0


@dataclass(frozen=True, eq=False)
class Term:
    """One w_k hat_k of the sum, ready to be computed: ``factor * m_k * delta_k``.

    Attributes:
        model: The fine-tuned model that it comes from.
        theta: theta_k as a contiguous vector.
        key: The key of m_k.
        t: d_k in units of 1 / 65536.
        factor: w_k / d_k, or w_k if rescale is false; for linear also times lambda and
            divided by the sum of weights, which are the same for all elements there.

    """

    model: FineTuned
    theta: Tensor
    key: int
    t: int
    factor: float


def merge(base: Tensor, models: Sequence[FineTuned], recipe: Recipe) -> Tensor:
    """Merge the deltas of fine-tuned models into a base tensor.

    Args:
        base: theta_0: any shape and strides; bfloat16, float16, float32 or float64.
        models: In any order: the result is the same to the bit.
        recipe: The method and its shared parameters.

    Returns:
        A new contiguous tensor of the shape, dtype and device of ``base``.

    Raises:
        ValueError: a dtype is not supported, a delta is not finite, or the result overflows
            its dtype.

    """
    for tensor in (base, *(model.tensor for model in models)):
        if tensor.dtype not in SUPPORTED_DTYPES:
            raise ValueError(
                f"tensor {recipe.tensor_name} has dtype {_dtype_name(tensor.dtype)}; DARE takes "
                f"{', '.join(map(_dtype_name, SUPPORTED_DTYPES))}: set dtype in the config"
            )
    terms = terms_of(models, recipe)
    theta_0 = base.detach().reshape(-1)
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    with torch.inference_mode():
        if not terms:
            return out.copy_(base)
        bound = _merge_chunks(out.view(-1), theta_0, terms, recipe)
        if not bound < _overflow_limit(out.dtype):
            _raise_non_finite_deltas(theta_0, terms, recipe)
            _merge_chunks(out.view(-1), theta_0, terms, recipe, equal_infinities=True)
            _raise_overflow(out.view(-1), theta_0, recipe)
    return out


def terms_of(models: Sequence[FineTuned], recipe: Recipe) -> list[Term]:
    """Return the terms of the sum that are not zero throughout, in an order of their own.

    They are sorted by their masks' keys: a floating-point sum depends on its order, and the
    order of the models in a config must not matter.
    """
    scale = 1.0
    if recipe.combine is Combine.LINEAR:
        scale = recipe.lambda_
        if recipe.normalize:
            divisor = math.fsum(model.weight for model in models)
            scale /= divisor if abs(divisor) >= _SMALLEST_LINEAR_DIVISOR else 1.0
    terms = []
    for model in models:
        t = threshold(model.density)
        if model.weight == 0 or t == 0 or model.tensor.numel() == 0:
            continue
        theta = model.tensor.detach().contiguous()
        key = mask_key(recipe.seed, recipe.tensor_name, theta)
        rescale = LANE_VALUES / t if recipe.rescale else 1.0
        terms.append(Term(model, theta.view(-1), key, t, model.weight * rescale * scale))
    return sorted(terms, key=lambda term: (term.key, term.t, term.factor))


def _merge_chunks(
    out: Tensor,
    theta_0: Tensor,
    terms: Sequence[Term],
    recipe: Recipe,
    *,
    equal_infinities: bool = False,
) -> float:
    """Fill ``out`` and return a bound of all magnitudes before rounding, NaN if there is a NaN.

    The bound is the largest chunk's L2 norm, which takes a fifth of the time of a maximum.
    ``equal_infinities`` makes the delta of elements that are equal zero also where they are
    infinite; that takes time and is rarely needed.
    """
    buffers = Buffers.of_this_thread(theta_0.device, work_dtype(theta_0, terms))
    square_sums: list[Tensor] = []
    vectors = (out, theta_0, *(term.theta for term in terms))
    for start, (out_chunk, base_chunk, *theta_chunks) in chunks(buffers.capacity, *vectors):
        b = buffers.first(out_chunk.numel())
        base = base_chunk if base_chunk.dtype == b.dtype else b.base.copy_(base_chunk)
        for term, theta in zip(terms, theta_chunks, strict=True):
            delta = _delta(theta, base, out=b.delta)
            if equal_infinities:
                delta.masked_fill_(theta == base_chunk, 0)
            m = keep_mask(term.key, term.t, start, b.mask, b.mask_buffers)
            _add_term(b, m, delta.mul_(term.factor), term, recipe, first=term is terms[0])
        result = out_chunk if out_chunk.dtype == b.dtype else b.delta
        if recipe.combine is Combine.LINEAR:
            torch.add(base, b.sum, out=result)
        else:
            torch.add(base, _twice_elected_sum(b, recipe), alpha=0.5, out=result)
        square_sums.append(torch.dot(result, result))
        if result is not out_chunk:
            out_chunk.copy_(result)
        _keep_negative_zeros(out_chunk, base_chunk)
    return math.sqrt(float(torch.stack(square_sums).max()))


def _delta(theta: Tensor, base: Tensor, *, out: Tensor) -> Tensor:
    """delta_k = theta_k - theta_0."""
    if theta.dtype == out.dtype:
        return torch.sub(theta, base, out=out)
    return out.copy_(theta).sub_(base)


def _add_term(b: Buffers, m: Tensor, x: Tensor, term: Term, recipe: Recipe, *, first: bool) -> None:
    """Add w_k hat_k = m_k x_k to the sum and, for TIES, to what decides the election."""
    if recipe.combine is Combine.LINEAR:
        _accumulate(b.sum, m, x, first)
        return
    if recipe.normalize:
        _accumulate_weights(b, m, x, term.model.weight, first)
    if first:
        torch.mul(m, x, out=b.sum)
        torch.abs(b.sum, out=b.magnitudes)
    else:  # the masked term serves twice, so it pays to write it
        b.sum.add_(x.mul_(m))
        b.magnitudes.add_(x.abs_())


def _accumulate(total: Tensor, m: Tensor, x: Tensor, first: bool) -> None:
    """Add m_k x_k to the sum, or start the sum with it.

    m is 0 or 1, so the product is exact: a fused multiply-add gives the same bits.
    """
    if first:
        torch.mul(m, x, out=total)
    else:
        total.addcmul_(m, x)


def _accumulate_weights(b: Buffers, m: Tensor, x: Tensor, weight: float, first: bool) -> None:
    """Add what a normalized TIES divides by: the weights, with the sign of each term and without.

    As in :func:`_twice_elected_sum`, (sum of weights + s * signed sum) / 2 are the weights of
    the terms with sign s.
    """
    sign = torch.sign(x, out=b.scratch)
    _accumulate(b.signed_weights, m, sign.mul_(weight), first)
    _accumulate(b.weights, m, sign.abs_().mul_(math.copysign(1, weight)), first)


def _twice_elected_sum(b: Buffers, recipe: Recipe) -> Tensor:
    """2 lambda D for TIES, from the sum of the terms and the sum of their magnitudes.

    With s the sign of the sum, the terms of sign s add up to (sum + s * sum of magnitudes) / 2,
    so no term needs to be kept until s is known. Both summands have the sign s, so nothing
    cancels. The sum is never -0 unless every term is 0: its sign bit is s.
    """
    integer, sign_bit = _INTEGERS[b.dtype]
    s = torch.bitwise_and(b.sum.view(integer), sign_bit, out=b.mask.view(integer))
    b.magnitudes.view(integer).bitwise_or_(s)
    twice = b.magnitudes.add_(b.sum)
    if recipe.normalize:
        b.signed_weights.view(integer).bitwise_xor_(s)
        divisor = b.weights.add_(b.signed_weights).mul_(0.5)
        twice.div_(divisor.masked_fill_(divisor == 0, 1))
    return twice if recipe.lambda_ == 1 else twice.mul_(recipe.lambda_)


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


def _keep_negative_zeros(out: Tensor, base: Tensor) -> None:
    """Undo -0.0 + 0.0 = 0.0: where all is dropped, the result is the base to the bit."""
    integer, negative_zero = _INTEGERS[base.dtype]
    base_bits = base.view(integer)
    if int(base_bits.min()) == negative_zero:
        out_bits = out.view(integer)
        out_bits.masked_fill_((base_bits == negative_zero) & (out_bits == 0), negative_zero)


def work_dtype(theta_0: Tensor, terms: Sequence[Term]) -> torch.dtype:
    """Return the dtype of all arithmetic: float64 if an input is float64, else float32."""
    dtypes = {theta_0.dtype, *(term.theta.dtype for term in terms)}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def chunk_size(device: torch.device) -> int:
    """Return the number of elements that are worked on at once, a multiple of 4."""
    if device.type != "cpu":
        return ACCELERATOR_CHUNK
    return min(CPU_CHUNK_PER_THREAD * torch.get_num_threads(), LARGEST_CPU_CHUNK)


def chunks(size: int, *vectors: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Yield the index of each chunk's first element and the chunk's part of each vector."""
    elements = vectors[0].numel()
    if elements <= size:  # the common case; a split takes as long as merging 10,000 elements
        yield 0, vectors
        return
    yield from zip(
        range(0, elements, size),
        zip(*(torch.split(vector, size) for vector in vectors), strict=True),
        strict=True,
    )


@dataclass
class Buffers:
    """All the memory that a merge needs beside its inputs and its output.

    Every tensor has the shape (capacity,) and the dtype of the arithmetic.
    """

    mask_buffers: MaskBuffers
    rows: Tensor
    base: Tensor
    delta: Tensor
    mask: Tensor
    sum: Tensor
    magnitudes: Tensor
    signed_weights: Tensor
    weights: Tensor
    scratch: Tensor

    @property
    def capacity(self) -> int:
        """Elements in a chunk."""
        return self.base.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return self.base.dtype

    @classmethod
    def of_this_thread(cls, device: torch.device, dtype: torch.dtype) -> Buffers:
        """Return the calling thread's buffers, which are made once and then kept."""
        kept: dict[tuple[torch.device, torch.dtype], Buffers]
        kept = _PER_THREAD.__dict__.setdefault("buffers", {})
        buffers = kept.get((device, dtype))
        capacity = chunk_size(device)
        if buffers is None or buffers.capacity != capacity:
            rows = torch.empty(8, capacity, dtype=dtype, device=device)
            mask_buffers = MaskBuffers.allocate(capacity, device)
            buffers = kept[device, dtype] = cls(mask_buffers, rows, *rows.unbind())
        return buffers

    def first(self, elements: int) -> Buffers:
        """Return views of the first ``elements`` elements."""
        if elements == self.capacity:
            return self
        rows = self.rows[:, :elements]
        return Buffers(self.mask_buffers.first(elements), rows, *rows.unbind())


_PER_THREAD = threading.local()


def _overflow_limit(dtype: torch.dtype) -> float:
    """Return the least magnitude that rounding to ``dtype`` makes infinite."""
    if dtype == torch.float64:  # no arithmetic here is wider
        return math.inf
    info = torch.finfo(dtype)
    _, exponent = math.frexp(info.max)
    return math.ldexp(1 - info.eps / 4, exponent)


def _raise_non_finite_deltas(theta_0: Tensor, terms: Sequence[Term], recipe: Recipe) -> None:
    """Raise ValueError for the first model with deltas that are NaN or infinite, if any."""
    for term in terms:
        bad = bad_in_base = 0
        wide = work_dtype(theta_0, terms)
        for _, (base, theta) in chunks(chunk_size(theta_0.device), theta_0, term.theta):
            unequal = theta != base
            bad += int((unequal & ~torch.isfinite(theta.to(wide) - base.to(wide))).sum())
            bad_in_base += int((unequal & ~torch.isfinite(base)).sum())
        if bad:
            at_fault = "the base model" if bad_in_base == bad else f"model {term.model.name}"
            raise ValueError(
                f"tensor {recipe.tensor_name} of {at_fault} gives {bad} of {theta_0.numel()} "
                f"deltas that are NaN or infinite (model {term.model.name} minus the base "
                "model); the file is damaged, or the model diverged"
            )


def _raise_overflow(out: Tensor, theta_0: Tensor, recipe: Recipe) -> None:
    """Raise ValueError if elements that are finite in the base are not so in the result."""
    overflows = sum(
        int((torch.isfinite(before) & ~torch.isfinite(after)).sum().item())
        for _, (before, after) in chunks(chunk_size(out.device), theta_0, out)
    )
    if overflows:
        limit = torch.finfo(out.dtype).max
        raise ValueError(
            f"merged tensor {recipe.tensor_name} overflows {_dtype_name(out.dtype)} (largest "
            f"{limit:g}) in {overflows} of {out.numel()} elements; lower weight or lambda, raise "
            "density, or set a wider dtype, such as bfloat16"
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
