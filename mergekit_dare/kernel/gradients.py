"""Differentiating through a merge.

Every element of the result is ``theta_0 + sum_k a_k (theta_k - theta_0)`` with factors ``a_k``
that are constant between the jumps of masks, probabilities, signs and roundings. So the tangents
t of the inputs give the result's ``t_0 + sum_k a_k (t_k - t_0)``, and the gradient g of the result
gives ``a_k g`` to theta_k and ``g - sum_k a_k g`` to theta_0. Both are linear, and each is the
other's derivative: that makes every further derivative right, too. The factors are computed anew
from the same masks: nothing but the inputs is stored in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mergekit_dare.kernel import merging
from mergekit_dare.kernel.buffers import Buffers, chunks
from mergekit_dare.kernel.formula import (
    Combine,
    accumulate,
    elected_sign,
    elected_weights,
    sparsify,
)
from mergekit_dare.kernel.merging import FineTuned, Job, Recipe


def merge(base: Tensor, models: Sequence[FineTuned], recipe: Recipe) -> Tensor:
    """Merge as :func:`.merging.merge` does, with gradients where they are asked for.

    The values are those of ``merging.merge`` to the bit, and it raises the same errors. Gradients
    and tangents, of any order, take masks and signs as constants.
    """
    tensors = [base, *(model.tensor for model in models)]
    if _are_derivatives_asked_for(tensors):
        merged: Tensor = _Merge.apply(models, recipe, *tensors)  # type: ignore[no-untyped-call]
        return merged
    with _outside_of_transforms():
        return merging.merge(base, models, recipe)


# Private in torch, without a public equal; where it is gone, nothing is taken for wrapped, and no
# transform for active.
_functorch = getattr(torch._C, "_functorch", None)
_is_wrapped = getattr(_functorch, "is_functorch_wrapped_tensor", lambda tensor: False)
_active_transform = getattr(_functorch, "peek_interpreter_stack", lambda: None)


def is_transformed() -> bool:
    """Tell whether one of torch.func's transforms is active, so that tensors may be wrapped."""
    return _active_transform() is not None


def _outside_of_transforms() -> AbstractContextManager[object]:
    """Keep torch.func's transforms from wrapping what is made in this block: it is constant."""
    if not is_transformed():
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def _are_derivatives_asked_for(tensors: Sequence[Tensor]) -> bool:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    # torch.func's transforms wrap the tensors, and take a Function or say what they cannot take.
    if any(_is_wrapped(tensor) for tensor in tensors):
        return True
    # Tangents are asked for inside of forward_ad.dual_level() alone, which counts levels.
    return getattr(forward_ad, "_current_level", 0) >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


class _OfMerge(torch.autograd.Function):
    """What the three functions below share: their first inputs are those of the merge."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.models, ctx.recipe, *tensors = inputs
        of_merge = tensors[: len(ctx.models) + 1]
        ctx.save_for_backward(*of_merge)  # fails if one is changed before it is used
        ctx.save_for_forward(*of_merge)


class _Merge(_OfMerge):
    """The merge itself: (base, *thetas) to the merged tensor."""

    @staticmethod
    def forward(models: Sequence[FineTuned], recipe: Recipe, *inputs: Tensor) -> Tensor:
        base, *thetas = inputs
        return merging.merge(base, _with_tensors(models, thetas), recipe)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *_to_inputs(ctx, grad))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _to_output(ctx, tangents[2:])


class _ToInputs(_OfMerge):
    """(base, *thetas, the gradient of the merged tensor) to those of base and thetas."""

    @staticmethod
    def forward(
        models: Sequence[FineTuned], recipe: Recipe, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        base, *thetas, grad = tensors
        models = _with_tensors(models, thetas)
        to_base = grad.clone(memory_format=torch.contiguous_format)
        to_model = {
            model: torch.zeros_like(model.tensor, memory_format=torch.contiguous_format)
            for model in models
        }
        with torch.inference_mode():
            job = merging.plan(base, models, recipe)
            for part, factors in _factors(job):
                g = grad.reshape(-1)[part].to(job.steps.dtype)
                rest = g.clone()
                for a, term in zip(factors, job.terms, strict=True):
                    to_model[term.model].view(-1)[part] = a * g
                    rest -= a * g
                to_base.view(-1)[part] = rest
        return (to_base, *to_model.values())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, *(None for _ in ctx.saved_tensors), _to_output(ctx, grads))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        grad = tangents[-1]
        assert grad is not None
        return _to_inputs(ctx, grad)


class _ToOutput(_OfMerge):
    """(base, *thetas, the tangents of each of them) to the tangent of the merged tensor."""

    @staticmethod
    def forward(models: Sequence[FineTuned], recipe: Recipe, *tensors: Tensor) -> Tensor:
        count = len(models) + 1
        base, *thetas = tensors[:count]
        t_0, *t = tensors[count:]
        models = _with_tensors(models, thetas)
        tangents = dict(zip(models, t, strict=True))
        out = t_0.to(base.dtype, memory_format=torch.contiguous_format, copy=True)
        with torch.inference_mode():
            job = merging.plan(base, models, recipe)
            for part, factors in _factors(job):
                start = t_0.reshape(-1)[part].to(job.steps.dtype)
                total = start.clone()
                for a, term in zip(factors, job.terms, strict=True):
                    total += a * (tangents[term.model].reshape(-1)[part] - start)
                out.view(-1)[part] = total
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *(None for _ in ctx.saved_tensors), *_to_inputs(ctx, grad))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _to_output(ctx, tangents[-len(ctx.saved_tensors) :])


def _to_inputs(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...]
    found = _ToInputs.apply(ctx.models, ctx.recipe, *ctx.saved_tensors, grad)  # type: ignore[no-untyped-call]
    return found


def _to_output(ctx: Any, tangents: Sequence[Tensor | None]) -> Tensor:
    inputs = ctx.saved_tensors
    given = [
        torch.zeros_like(tensor) if tangent is None else tangent
        for tensor, tangent in zip(inputs, tangents, strict=True)
    ]
    found: Tensor = _ToOutput.apply(ctx.models, ctx.recipe, *inputs, *given)  # type: ignore[no-untyped-call]
    return found


def _with_tensors(models: Sequence[FineTuned], thetas: Sequence[Tensor]) -> list[FineTuned]:
    return [replace(m, tensor=theta) for m, theta in zip(models, thetas, strict=True)]


def _factors(job: Job) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield each chunk, and a_k of its elements for each term."""
    if not job.terms:
        return
    job = merging.with_equal_infinities(job)
    steps, ties = job.steps, job.steps.combine is Combine.TIES
    with Buffers.lent(job.theta_0.device, steps.dtype) as buffers:
        for first, (theta_0, *thetas) in chunks(buffers.capacity, *job.vectors):
            b, numbers = buffers.first(theta_0.numel()), job.numbers(first)
            base = theta_0.to(steps.dtype)
            factors, signs = [], []
            for k, theta in enumerate(thetas):
                m, delta = sparsify(k, theta, theta_0, base, numbers, steps, b)
                a = m * job.terms[k].factor
                signs.append(torch.sign(delta * a))
                # By magnitude, sparsify leaves the probability there.
                factors.append(a / b.scratch if steps.by_magnitude and steps.rescale else a)
                accumulate(k, m, delta, numbers, steps, b)
            if ties:
                s = elected_sign(b)
                scale = torch.full_like(base, job.lambda_)
                if steps.normalize:
                    scale /= elected_weights(b, s)
                factors = [a * (sign == s) * scale for a, sign in zip(factors, signs, strict=True)]
            yield slice(first, first + theta_0.numel()), factors
