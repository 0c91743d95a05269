"""Merge the fine-tuned models' versions of one tensor into the base model's.

The formula itself is in :mod:`mergekit_dare.kernel.formula`; here are its inputs and outputs:
what is checked before, what the numbers in it are, and what may not leave it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_dare.kernel import compiled
from mergekit_dare.kernel.buffers import chunk_size, chunks
from mergekit_dare.kernel.formula import SUPPORTED_DTYPES, Combine, Numbers, Steps, merge_chunks
from mergekit_dare.kernel.masks import LANE_VALUES, mask_key, threshold

_SMALLEST_LINEAR_DIVISOR = 1e-8


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

    The bound is the largest chunk's L2 norm.
    """
    ties = recipe.combine is Combine.TIES
    half = 0.5 if ties else 1.0
    steps = Steps(
        recipe.combine,
        work_dtype(theta_0, terms),
        normalize=ties and recipe.normalize,
        scale=ties and recipe.lambda_ != 1,
        equal_infinities=equal_infinities,
    )
    numbers = Numbers(
        states=(),
        thresholds=[term.t for term in terms],
        factors=[term.factor * half for term in terms],
        weights=[term.model.weight * half for term in terms],
        lambda_=recipe.lambda_,
    )
    vectors = (out, theta_0, [term.theta for term in terms], [term.key for term in terms])
    done, largest = compiled.merge_chunks(*vectors, numbers, steps)
    rest = merge_chunks(*vectors, numbers, steps, start=done)
    square_sums = [square_sum for square_sum in (largest, rest) if square_sum is not None]
    return math.sqrt(float(torch.stack(square_sums).max()))


def work_dtype(theta_0: Tensor, terms: Sequence[Term]) -> torch.dtype:
    """Return the dtype of all arithmetic: float64 if an input is float64, else float32."""
    dtypes = {theta_0.dtype, *(term.theta.dtype for term in terms)}
    return torch.float64 if torch.float64 in dtypes else torch.float32


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
