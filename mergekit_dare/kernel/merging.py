"""Merge the fine-tuned models' versions of one tensor into the base model's.

The formula itself is in :mod:`mergekit_dare.kernel.formula`; here are its inputs and outputs:
what is checked before, what the numbers in it are, and what may not leave it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergekit_dare.kernel import compiled, recorded, threads
from mergekit_dare.kernel.buffers import Buffers, chunk_size, chunks
from mergekit_dare.kernel.formula import (
    SUPPORTED_DTYPES,
    Combine,
    Numbers,
    Steps,
    dtype_name,
    merge_chunk,
)
from mergekit_dare.kernel.masks import (
    LANE_VALUES,
    mask_key,
    rounding_key,
    state_before,
    threshold,
)
from mergekit_dare.kernel.rounding import NARROW, Rounding
from mergekit_dare.kernel.sampling import GREATEST_FOR_FLOAT32, Sampling, magnitude_scale

_SMALLEST_LINEAR_DIVISOR = 1e-8
# Numbers beyond these make float32 products under- or overflow whose quotients need not: then the
# arithmetic is in float64.
_LEAST_FACTOR, _GREATEST_FACTOR = 2.0**-60, 2.0**60
# Elements times models for which another thread is started, to merge them or to make their keys:
# that takes up to a quarter of a millisecond, and keys wait for the memory more than for a core.
LEAST_MERGED, LEAST_PLANNED = 1 << 19, 1 << 25


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
        tensor_name: The output tensor's name, for error messages only; may be empty.
        seed: Any integer: a part of the masks' keys.
        normalize: Divide by the sum of the weights.
        rescale: Divide the kept deltas by their probability.
        lambda_: Factor of the merged delta.
        sampling: How the probability of a delta to be kept depends on its size.
        rounding: How the result is rounded to the base's dtype; for float32 and float64 there
            is nothing to round.

    """

    combine: Combine
    tensor_name: str
    seed: int
    normalize: bool = False
    rescale: bool = True
    lambda_: float = 1.0
    sampling: Sampling = Sampling.UNIFORM
    rounding: Rounding = Rounding.NEAREST

    @property
    def tensor(self) -> str:
        """Return what error messages call the tensor."""
        return f"tensor {self.tensor_name}".rstrip()


@dataclass(frozen=True, eq=False)
class Term:
    """One w_k hat_k of the sum, ready to be computed.

    Attributes:
        model: The fine-tuned model that it comes from.
        theta: theta_k as a contiguous vector.
        key: The key of m_k.
        t: The least T_k, in units of 1 / 65536: d_k, or by magnitude 1 or 65536.
        scale: c_k in units of 1 / 65536; by magnitude only.
        factor: w_k, with uniform sampling divided by d_k unless rescale is false; for linear also
            times lambda and divided by the sum of weights.
        weight: w_k; for a normalized TIES merge in units in which the largest is about 1, which
            changes no quotient.

    """

    model: FineTuned
    theta: Tensor
    key: int
    t: int
    scale: float
    factor: float
    weight: float

    def numbers(self) -> tuple[float, ...]:
        """Return what it is multiplied with."""
        return self.factor, self.weight


@dataclass(frozen=True, eq=False)
class Job:
    """One tensor's merge, ready to be computed.

    Attributes:
        theta_0: The base model's elements as a contiguous vector.
        terms: Those that are not zero throughout, in an order of their own.
        steps: What is done to every chunk.
        lambda_: Factor of the merged delta.
        rounding_key: The key of the stream that rounds the result.

    """

    theta_0: Tensor
    terms: Sequence[Term]
    steps: Steps
    lambda_: float
    rounding_key: int

    @property
    def vectors(self) -> list[Tensor]:
        """theta_0 and each theta_k."""
        return [self.theta_0, *(term.theta for term in self.terms)]

    def numbers(self, start: int) -> Numbers:
        """Return the formula's numbers for the chunk whose first element is ``start``."""
        keys = [*(term.key for term in self.terms), self.rounding_key]
        return Numbers(
            states=[state_before(key, start) for key in keys],
            thresholds=[term.t for term in self.terms],
            scales=[term.scale for term in self.terms],
            factors=[term.factor for term in self.terms],
            weights=[term.weight for term in self.terms],
            lambda_=self.lambda_,
        )


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
    _check_dtype("the base model", base, recipe)
    for model in models:
        _check_dtype(f"model {model.name}", model.tensor, recipe)
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    with torch.inference_mode():
        job = plan(base, models, recipe)
        if not job.terms:
            with threads.single():
                return out.copy_(base)
        bound = _merge_chunks(out.view(-1), job)
        if not bound < _overflow_limit(out.dtype):
            _raise_non_finite_deltas(job, recipe)
            _merge_chunks(out.view(-1), with_equal_infinities(job))
            _raise_overflow(out.view(-1), job.theta_0, recipe)
    return out


def plan(base: Tensor, models: Sequence[FineTuned], recipe: Recipe) -> Job:
    """Find the numbers of the formula for one tensor."""
    theta_0 = base.detach()
    if theta_0.is_neg() or not theta_0.is_contiguous():
        with threads.single():
            theta_0 = theta_0.resolve_neg().contiguous()
    theta_0 = theta_0.view(-1)
    terms = _terms(theta_0, models, recipe)
    by_magnitude = recipe.sampling is Sampling.MAGNITUDE
    stochastic = recipe.rounding is Rounding.STOCHASTIC and base.dtype in NARROW
    ties = recipe.combine is Combine.TIES
    steps = Steps(
        recipe.combine,
        _work_dtype(theta_0, terms, recipe),
        by_magnitude=by_magnitude,
        rescale=recipe.rescale,
        normalize=ties and recipe.normalize,
        scale=ties and recipe.lambda_ != 1,
        stochastic=stochastic,
    )
    keys = [term.key for term in terms]
    key = 0
    if stochastic and terms:
        with threads.single():
            key = rounding_key(recipe.seed, theta_0.view(base.shape), keys)
    return Job(theta_0, terms, steps, recipe.lambda_, key)


def with_equal_infinities(job: Job) -> Job:
    """Return the job for tensors in which elements may be infinite, and equal, in all models."""
    return replace(job, steps=replace(job.steps, equal_infinities=True))


def _terms(theta_0: Tensor, models: Sequence[FineTuned], recipe: Recipe) -> list[Term]:
    """Return the terms of the sum that are not zero throughout, in an order of their own.

    They are sorted by their masks' keys: a floating-point sum depends on its order, and the
    order of the models in a config must not matter.
    """
    weight_unit, factor_unit = _units(models, recipe)

    def make(models: Iterator[FineTuned]) -> list[Term]:
        return [_term(model, theta_0, recipe, weight_unit, factor_unit) for model in models]

    used = [m for m in models if m.weight != 0 and threshold(m.density) > 0 and theta_0.numel()]
    most = _most_threads(theta_0.device, theta_0.numel(), len(used), LEAST_PLANNED)
    terms = itertools.chain(*threads.run(make, used, most))
    return sorted(terms, key=lambda term: (term.key, term.t, term.scale, term.factor))


def _term(
    model: FineTuned, theta_0: Tensor, recipe: Recipe, weight_unit: float, factor_unit: float
) -> Term:
    by_magnitude = recipe.sampling is Sampling.MAGNITUDE
    t, scale = threshold(model.density), 0.0
    theta = model.tensor.detach().resolve_neg().contiguous()
    key = mask_key(recipe.seed, theta)
    theta = theta.view(-1)
    rescale = LANE_VALUES / t if recipe.rescale and not by_magnitude else 1.0
    if by_magnitude:
        dtype = _wide_dtype(theta_0, theta)
        found = magnitude_scale(theta, theta_0, model.density, dtype)
        t, scale = (LANE_VALUES, 0.0) if found is None else (1, found)
    factor = model.weight * rescale * factor_unit
    return Term(model, theta, key, t, scale, factor, model.weight * weight_unit)


def _units(models: Sequence[FineTuned], recipe: Recipe) -> tuple[float, float]:
    """Return what weights and what factors are multiplied with."""
    if recipe.combine is Combine.LINEAR:
        divisor = math.fsum(model.weight for model in models) if recipe.normalize else 1.0
        return 1.0, recipe.lambda_ / (divisor if abs(divisor) >= _SMALLEST_LINEAR_DIVISOR else 1.0)
    if not recipe.normalize:
        return 1.0, 1.0
    _, exponent = math.frexp(max((abs(model.weight) for model in models), default=1.0))
    unit = 2.0 ** min(max(-exponent, -1000), 1000)
    return unit, unit


def _merge_chunks(out: Tensor, job: Job) -> float:
    """Fill ``out`` and return a bound of all magnitudes before rounding, NaN if there is a NaN.

    The bound is the largest chunk's L2 norm, or more. Chunks are merged by compiled code, if there
    is any, else by a recording, if it pays.
    """
    device, steps = out.device, job.steps
    on_cpu = device.type == "cpu"
    merge_fast = compiled.merge_function(job.vectors, steps, job.numbers)
    merge_fast = merge_fast or recorded.merge_function(job.vectors, steps, job.numbers)

    def merge_all(pieces: Iterator[Piece]) -> list[float]:
        norms: list[float | Tensor] = []
        for first, chunk in pieces:
            numbers = job.numbers(first)
            norm: float | Tensor | None = merge_fast and merge_fast(chunk, numbers)
            if norm is None:
                out, theta_0, *thetas = chunk
                with Buffers.lent(device, steps.dtype) as b:
                    part = b.first(out.numel(), len(thetas))
                    norm = merge_chunk(out, theta_0, thetas, numbers, steps, part)
            # A device is not waited for before the end.
            norms.append(float(norm) if on_cpu else norm)
        return [float(norm) for norm in norms]

    most = _most_threads(device, out.numel(), len(job.terms), LEAST_MERGED)
    pieces = chunks(chunk_size(device), out, *job.vectors)
    norms = [*itertools.chain(*threads.run(merge_all, pieces, most))]
    return math.nan if any(map(math.isnan, norms)) else max(norms)


def _most_threads(device: torch.device, elements: int, models: int, least: int) -> int:
    """Return at most how many threads pay; 0 where torch takes but one by itself, or a device."""
    if device.type != "cpu" or elements <= threads.TORCHS_LEAST:
        return 0
    return max(1, elements * models // least)


Piece = tuple[int, tuple[Tensor, ...]]


def _wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if a tensor is float64, else float32."""
    wide = torch.float64 in {tensor.dtype for tensor in tensors}
    return torch.float64 if wide else torch.float32


def _work_dtype(theta_0: Tensor, terms: Sequence[Term], recipe: Recipe) -> torch.dtype:
    """Return the dtype of all arithmetic: float64 if an input is float64, else float32.

    Numbers that float32 products could lose are another reason for float64.
    """
    numbers = [recipe.lambda_, *(number for term in terms for number in term.numbers())]
    outside = any(n and not _LEAST_FACTOR <= abs(n) <= _GREATEST_FACTOR for n in numbers)
    if outside or any(term.scale > GREATEST_FOR_FLOAT32 for term in terms):
        return torch.float64
    return _wide_dtype(theta_0, *(term.theta for term in terms))


def _overflow_limit(dtype: torch.dtype) -> float:
    """Return the least magnitude that rounding to ``dtype`` makes infinite."""
    if dtype == torch.float64:  # no arithmetic here is wider
        return math.inf
    info = torch.finfo(dtype)
    _, exponent = math.frexp(info.max)
    return math.ldexp(1 - info.eps / 4, exponent)


def _check_dtype(name: str, tensor: Tensor, recipe: Recipe) -> None:
    """Raise ValueError for a dtype that no merge can take."""
    if tensor.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"{recipe.tensor} of {name} has dtype {dtype_name(tensor.dtype)}; DARE "
            f"takes {', '.join(map(dtype_name, SUPPORTED_DTYPES))}: if {name} is quantized, these "
            "are codes, which cannot be merged; dequantize it first"
        )


@threads.single()
def _raise_non_finite_deltas(job: Job, recipe: Recipe) -> None:
    """Raise ValueError for the first model with deltas that are NaN or infinite, if any."""
    theta_0, wide = job.theta_0, _wide_dtype(*job.vectors)
    for term in job.terms:
        bad = bad_in_base = 0
        for _, (base, theta) in chunks(chunk_size(theta_0.device), theta_0, term.theta):
            unequal = theta != base
            bad += int((unequal & ~torch.isfinite(theta.to(wide) - base.to(wide))).sum())
            bad_in_base += int((unequal & ~torch.isfinite(base)).sum())
        if bad:
            at_fault = "the base model" if bad_in_base == bad else f"model {term.model.name}"
            raise ValueError(
                f"{recipe.tensor} of {at_fault} gives {bad} of {theta_0.numel()} "
                f"deltas that are NaN or infinite (model {term.model.name} minus the base "
                "model); the file is damaged, or the model diverged"
            )


@threads.single()
def _raise_overflow(out: Tensor, theta_0: Tensor, recipe: Recipe) -> None:
    """Raise ValueError if elements that are finite in the base are not so in the result."""
    overflows = sum(
        int((torch.isfinite(before) & ~torch.isfinite(after)).sum().item())
        for _, (before, after) in chunks(chunk_size(out.device), theta_0, out)
    )
    if overflows:
        limit = torch.finfo(out.dtype).max
        wider = ", or set a wider dtype, such as bfloat16" if out.dtype == torch.float16 else ""
        raise ValueError(
            f"merged {recipe.tensor} overflows {dtype_name(out.dtype)} (largest "
            f"{limit:g}) in {overflows} of {out.numel()} elements; lower weight or lambda, or "
            f"raise density{wider}"
        )
