"""Differentiating through a merge.

Every element of the result is ``theta_0 + sum_k a_k (theta_k - theta_0)`` with factors ``a_k``
that are constant between the jumps of masks and signs, so the gradient g of the result gives
``a_k g`` to theta_k and ``g - sum_k a_k g`` to theta_0. The backward pass computes the factors
anew from the same masks: nothing but the inputs is stored in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mergekit_dare.kernel import merging
from mergekit_dare.kernel.buffers import Buffers
from mergekit_dare.kernel.formula import Combine
from mergekit_dare.kernel.masks import MaskBuffers, keep_mask, state_before
from mergekit_dare.kernel.merging import FineTuned, Recipe, Term


def merge(base: Tensor, models: Sequence[FineTuned], recipe: Recipe) -> Tensor:
    """Merge as :func:`.merging.merge` does, with gradients where they are asked for.

    The values are those of ``merging.merge`` to the bit, and it raises the same errors.
    """
    tensors = [base, *(model.tensor for model in models)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        merged: Tensor = _Merge.apply(models, recipe, *tensors)  # type: ignore[no-untyped-call]
        return merged
    return merging.merge(base, models, recipe)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, models: Sequence[FineTuned], recipe: Recipe, base: Tensor, *thetas: Tensor
    ) -> Tensor:
        ctx.models, ctx.recipe = models, recipe
        ctx.save_for_backward(base, *thetas)
        return merging.merge(base, models, recipe)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        base, *thetas = ctx.saved_tensors  # fails if an input was changed since
        to_base = grad.clone(memory_format=torch.contiguous_format)
        to_model = {
            model: torch.zeros_like(theta, memory_format=torch.contiguous_format)
            for model, theta in zip(ctx.models, thetas, strict=True)
        }
        with torch.inference_mode():
            _backward(grad, base, ctx.models, ctx.recipe, to_base, to_model)
        return (None, None, to_base, *to_model.values())


def _backward(
    grad: Tensor,
    base: Tensor,
    models: Sequence[FineTuned],
    recipe: Recipe,
    to_base: Tensor,
    to_model: dict[FineTuned, Tensor],
) -> None:
    """Subtract the models' gradients from ``to_base`` and write them into ``to_model``."""
    terms = merging.terms_of(models, recipe)
    theta_0 = base.reshape(-1)
    dtype = merging.work_dtype(theta_0, terms)
    mask_buffers = Buffers.of_this_thread(base.device, dtype).mask_buffers
    gradients = [to_model[term.model].view(-1) for term in terms]
    for start in range(0, theta_0.numel(), mask_buffers.elements):
        part = slice(start, start + mask_buffers.elements)
        g = grad.reshape(-1)[part].to(dtype)
        rest = g.clone()
        thetas = [term.theta[part] for term in terms]
        buffers = mask_buffers.first(g.numel())
        factors = _factors(start, theta_0[part].to(dtype), thetas, terms, recipe, buffers)
        for a, gradient in zip(factors, gradients, strict=True):
            gradient[part] = a * g
            rest -= a * g
        to_base.view(-1)[part] = rest


def _factors(
    start: int,
    base: Tensor,
    thetas: Sequence[Tensor],
    terms: Sequence[Term],
    recipe: Recipe,
    buffers: MaskBuffers,
) -> list[Tensor]:
    """Return a_k of one chunk for each term."""
    masks = [
        keep_mask(state_before(term.key, start), term.t, torch.empty_like(base), buffers)
        for term in terms
    ]
    if recipe.combine is Combine.LINEAR:
        return [m * term.factor for m, term in zip(masks, terms, strict=True)]
    # The same roundings in the same order as in merging, so that the same signs are elected.
    hats = [
        m * ((theta.to(base.dtype) - base) * term.factor)
        for m, theta, term in zip(masks, thetas, terms, strict=True)
    ]
    positive = sum(hats[1:], hats[0]) >= 0
    agrees = [torch.where(positive, hat > 0, hat < 0) for hat in hats]
    scale = torch.full_like(base, recipe.lambda_)
    if recipe.normalize:
        divisor = torch.zeros_like(base)
        for agree, term in zip(agrees, terms, strict=True):
            divisor += agree * term.model.weight
        scale /= divisor.masked_fill_(divisor == 0, 1)
    return [agree * term.factor * scale for agree, term in zip(agrees, terms, strict=True)]
