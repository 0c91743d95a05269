"""Merge the fine-tuned models' versions of one tensor into the base model's.

The formula itself is in :mod:`mergekit_dare.kernel.formula`; this module handles what surrounds it:
the checks of the inputs, the numbers in it, what runs it, and the checks of the output.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from mergekit_dare.kernel import formula, threads
from mergekit_dare.kernel.formula import SUPPORTED_DTYPES, Combine, Job, Term, dtype_name
from mergekit_dare.kernel.masks import (
    CHECKSUM_BLOCK,
    LANE_VALUES,
    mask_key,
    rounding_key,
    threshold,
    unsigned_lanes,
)
from mergekit_dare.kernel.rounding import NARROW, Rounding, round_stochastically
from mergekit_dare.kernel.sampling import GREATEST_FOR_FLOAT32, Sampling, magnitude_scale

LOG = logging.getLogger(__name__)

_SMALLEST_LINEAR_DIVISOR = 1e-8
# Numbers beyond these can make float32 products under- or overflow although the results would not:
# then the arithmetic is in float64.
_LEAST_FACTOR, _GREATEST_FACTOR = 2.0**-60, 2.0**60
# Elements that torch works on at once. On a CPU, it does not split operations on so few among its
# threads; an accelerator needs enough to be busy, and has 250 MB of temporary tensors.
CPU_PIECE, ACCELERATOR_PIECE = 1 << 15, 1 << 22


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
        seed: Any integer; part of the masks' keys.
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


def merge(base: Tensor, models: Sequence[FineTuned], recipe: Recipe) -> Tensor:
    """Merge the deltas of fine-tuned models into a base tensor.

    Args:
        base: theta_0: any shape and strides; bfloat16, float16, float32 or float64.
        models: In any order: the result is the same to the bit.
        recipe: The method and its shared parameters.

    Returns:
        A new contiguous tensor of the shape, dtype and device of ``base``.

    Raises:
        ValueError: a dtype is not supported, shapes or devices differ, a delta is not finite, or
            the result overflows its dtype (stochastic rounding of a number beyond float16's
            largest gives that largest number).

    """
    merged, _ = merge_and_plan(base, models, recipe)
    return merged


def merge_and_plan(base: Tensor, models: Sequence[FineTuned], recipe: Recipe) -> tuple[Tensor, Job]:
    """Merge as :func:`merge` does, and also return what was done."""
    _check("the base model", base, base, recipe)
    for model in models:
        _check(f"model {model.name}", model.tensor, base, recipe)
    job = plan(base, models, recipe)
    merged = torch.empty_like(base, memory_format=torch.contiguous_format)
    out = merged.view(-1)
    if not job.terms:
        with threads.single():
            out.copy_(job.theta_0)
        return merged, job
    cpu = compiled_cpu(job.dtype) if out.device.type == "cpu" else None
    largest = cpu.merge(job, out) if cpu else _merge_by_torch(job, out)
    if not largest < _overflow_limit(out.dtype):
        with threads.single():
            _raise_non_finite_deltas(job, recipe)
            _raise_overflow(out, job.theta_0, recipe)
    return merged, job


def plan(base: Tensor, models: Sequence[FineTuned], recipe: Recipe) -> Job:
    """Compute the numbers in the formula for one tensor."""
    ties, by_magnitude = recipe.combine is Combine.TIES, recipe.sampling is Sampling.MAGNITUDE
    used = [
        (k, model)
        for k, model in enumerate(models)
        if model.weight != 0 and threshold(model.density) > 0 and base.numel()
    ]
    stochastic = recipe.rounding is Rounding.STOCHASTIC and base.dtype in NARROW and bool(used)
    with threads.single():
        theta_0, *thetas = (_vector(tensor) for tensor in (base, *(m.tensor for _, m in used)))
    dtype = _wide_dtype(theta_0, *thetas)
    sums = _checksums([*thetas, theta_0] if stochastic else thetas, dtype)  # in our threads
    with threads.single():
        weight_unit, factor_unit = _units(models, recipe)
        terms = []
        for (k, model), theta, of_theta in zip(used, thetas, sums, strict=False):
            key = mask_key(recipe.seed, theta, shape=base.shape, sums=of_theta)
            t, c, rescale = threshold(model.density), 0.0, 1.0
            if by_magnitude:
                wide = _wide_dtype(theta_0, theta)
                found = magnitude_scale(theta, theta_0, model.density, wide)
                t, c = (LANE_VALUES, 0.0) if found is None else (1, found)
            elif recipe.rescale:
                rescale = LANE_VALUES / t
            factor, weight = model.weight * rescale * factor_unit, model.weight * weight_unit
            terms.append(Term(model.name, k, theta, key, t, c, factor, weight))
        # A floating-point sum depends on its order, but the order of the models in a config must
        # not matter.
        terms.sort(key=lambda term: (term.key, term.t, term.c, term.factor))
        key_of_rounding = None
        if stochastic:
            keys = [term.key for term in terms]
            key_of_rounding = rounding_key(
                recipe.seed, theta_0, keys, shape=base.shape, sums=sums[-1]
            )
    return Job(
        theta_0,
        terms,
        _work_dtype(dtype, terms, recipe),
        ties,
        ties and recipe.normalize,
        by_magnitude,
        recipe.rescale,
        recipe.lambda_ if ties else 1.0,
        key_of_rounding,
    )


def _vector(tensor: Tensor) -> Tensor:
    """Return a tensor's elements in row order, without a copy if it is contiguous."""
    tensor = tensor.detach()
    if tensor.is_neg() or not tensor.is_contiguous():
        tensor = tensor.resolve_neg().contiguous()
    return tensor.view(-1)


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


def _wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if a tensor is float64, else float32."""
    wide = torch.float64 in {tensor.dtype for tensor in tensors}
    return torch.float64 if wide else torch.float32


def _work_dtype(wide: torch.dtype, terms: Sequence[Term], recipe: Recipe) -> torch.dtype:
    """Return float64 if ``wide`` is, or if float32 products could lose a number, else float32."""
    numbers = [recipe.lambda_, *(n for term in terms for n in (term.factor, term.weight))]
    within = all(_LEAST_FACTOR <= abs(n) <= _GREATEST_FACTOR for n in numbers if n)
    within = within and all(term.c <= GREATEST_FOR_FLOAT32 for term in terms)
    return wide if within else torch.float64


@cache
def compiled_cpu(dtype: torch.dtype) -> ModuleType | None:
    """Return the module cpu, with loops compiled for a dtype of arithmetic, if Numba works here."""
    try:
        from mergekit_dare.kernel import cpu

        cpu.compile_for(dtype)
    except Exception as error:  # whatever it is, the merge must go on
        reason = str(error).strip().partition("\n")[0]
        _warn_once(f"{type(error).__name__}: {reason}")
        return None
    return cpu


@cache
def _warn_once(reason: str) -> None:
    LOG.warning(
        "merging on the CPU without Numba, which takes at least twenty times as long: %s", reason
    )


def _checksums(vectors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[bytes | None]:
    """Return :func:`.masks.checksums` of all vectors, or None for each, to leave it to masks.py.

    ``dtype``: the one in which they are probably merged.
    """
    large = any(vector.nbytes >= CHECKSUM_BLOCK for vector in vectors)
    on_cpu = all(vector.device.type == "cpu" for vector in vectors)
    cpu = compiled_cpu(dtype) if large and on_cpu else None
    return cpu.checksums(vectors) if cpu else [None] * len(vectors)


def pieces(vector: Tensor) -> Iterator[slice]:
    """Yield the parts of a vector that torch works on at once."""
    size = CPU_PIECE if vector.device.type == "cpu" else ACCELERATOR_PIECE
    for start in range(0, vector.numel(), size):
        yield slice(start, min(vector.numel(), start + size))


@torch.inference_mode()
def _merge_by_torch(job: Job, out: Tensor) -> float:
    """Merge a tensor into ``out``; return the largest magnitude before rounding, or NaN."""
    largest = []
    with threads.single():
        for piece in pieces(out):
            result = formula.merge(job, piece)
            largest.append(result.abs().max())
            out[piece] = rounded(result, job, piece)
    return float(torch.stack(largest).max())  # the device is waited for only at the end


def rounded(result: Tensor, job: Job, piece: slice) -> Tensor:
    """Round a merged piece to the dtype of theta_0."""
    if job.rounding_key is None:
        return result.to(job.theta_0.dtype)
    lanes = unsigned_lanes(job.rounding_key, piece, result.device)
    return round_stochastically(result, lanes, job.theta_0.dtype)


@cache
def _overflow_limit(dtype: torch.dtype) -> float:
    """Return the least magnitude that rounding to ``dtype`` makes infinite."""
    if dtype == torch.float64:  # no arithmetic here is wider
        return math.inf
    info = torch.finfo(dtype)
    _, exponent = math.frexp(info.max)
    return math.ldexp(1 - info.eps / 4, exponent)


def _check(name: str, tensor: Tensor, base: Tensor, recipe: Recipe) -> None:
    """Raise ValueError for a tensor that cannot be merged."""
    if tensor.shape != base.shape or tensor.device != base.device:
        raise ValueError(
            f"{recipe.tensor} of {name} has shape {tuple(tensor.shape)} on {tensor.device}, but "
            f"{tuple(base.shape)} on {base.device} in the base model"
        )
    if tensor.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"{recipe.tensor} of {name} has dtype {dtype_name(tensor.dtype)}; DARE "
            f"merges {', '.join(map(dtype_name, SUPPORTED_DTYPES))}: if {name} is quantized, these "
            "are codes, which cannot be merged; dequantize it first"
        )


def _raise_non_finite_deltas(job: Job, recipe: Recipe) -> None:
    """Raise ValueError for the first model with deltas that are NaN or infinite, if any."""
    wide = _wide_dtype(job.theta_0, *(term.theta for term in job.terms))
    for term in job.terms:
        bad = bad_in_base = 0
        for piece in pieces(job.theta_0):
            base, theta = job.theta_0[piece], term.theta[piece]
            unequal = theta != base
            bad += int((unequal & ~torch.isfinite(theta.to(wide) - base.to(wide))).sum())
            bad_in_base += int((unequal & ~torch.isfinite(base)).sum())
        if bad:
            at_fault = "the base model" if bad_in_base == bad else f"model {term.name}"
            raise ValueError(
                f"{recipe.tensor} of {at_fault} makes {bad} of {job.theta_0.numel()} "
                f"deltas NaN or infinite (model {term.name} minus the base "
                "model); the file is damaged, or the model diverged"
            )


def _raise_overflow(out: Tensor, theta_0: Tensor, recipe: Recipe) -> None:
    """Raise ValueError if elements that are finite in the base are not finite in the result."""
    overflows = sum(
        int((torch.isfinite(theta_0[piece]) & ~torch.isfinite(out[piece])).sum())
        for piece in pieces(out)
    )
    if overflows:
        limit = torch.finfo(out.dtype).max
        wider = ", or set a wider dtype, such as bfloat16" if out.dtype == torch.float16 else ""
        raise ValueError(
            f"merged {recipe.tensor} overflows {dtype_name(out.dtype)} (largest "
            f"{limit:g}) in {overflows} of {out.numel()} elements; lower weight or lambda, or "
            f"raise density{wider}"
        )
