"""Differentiating through a merge, with torch's own derivatives of the formula.

Masks, signs, probabilities and what rounding adds are constants, so the result is linear in the
models' elements, and derivatives of every order, forward and reverse, are right wherever those
constants do not jump.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mergekit_dare.kernel import formula, merging, threads
from mergekit_dare.kernel.formula import Job
from mergekit_dare.kernel.merging import FineTuned, Recipe


def merge(base: Tensor, models: Sequence[FineTuned], recipe: Recipe) -> Tensor:
    """Merge as :func:`.merging.merge` does, with derivatives where they are asked for.

    The values are those of ``merging.merge`` to the bit, and it raises the same errors.

    Raises:
        RuntimeError: inside ``torch.func.vmap``, which has no whole tensors to draw for, and inside
            anything that records torch's operations to repeat them with other tensors.

    """
    if torch.jit.is_tracing() or _is_recorded_by_fx():  # type: ignore[attr-defined, no-untyped-call]
        raise RuntimeError(
            "a merge with DARE cannot be recorded by torch.jit.trace or make_fx: what is dropped "
            "depends on the tensors themselves"
        )
    tensors = [base, *(model.tensor for model in models)]
    asked = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    asked = asked or any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    if not asked and all(map(is_plain, tensors)):
        return merging.merge(base, models, recipe)
    found: list[tuple[Tensor, Job]] = []

    def look(base: Tensor, *thetas: Tensor) -> None:
        plain = [replace(m, tensor=theta) for m, theta in zip(models, thetas, strict=True)]
        found.append(merging.merge_and_plan(base, plain, recipe))

    try:
        _Look.apply(look, *tensors)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "Functionalize" not in str(error):
            raise
        raise RuntimeError("torch.func.functionalize does not support a merge with DARE") from error
    ((merged, job),) = found
    with threads.single():
        return _differentiable(job, base, models, merged) if asked else merged


def _is_recorded_by_fx() -> bool:
    recorder = sys.modules.get("torch.fx.experimental.proxy_tensor")  # imported by whatever records
    for name in ("get_proxy_mode", "get_innermost_proxy_mode"):  # the latter before torch 2.5
        if hasattr(recorder, name):
            return getattr(recorder, name)() is not None
    return False


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor's data can be read, and no transform of torch.func is active."""
    try:
        return tensor.detach().data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:
        return False


class _Look(torch.autograd.Function):
    """Calls a function with the tensors themselves, whatever transform has wrapped them."""

    @staticmethod
    def forward(look: Callable[..., None], *tensors: Tensor) -> Tensor:
        look(*(tensor.detach() for tensor in tensors))
        return torch.empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return torch.empty(0)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], look: Any, *tensors: Tensor
    ) -> tuple[Tensor, None]:
        if any(dim is not None for dim in in_dims):
            raise RuntimeError(
                "torch.func.vmap does not support a merge with DARE, whose masks depend on whole "
                "tensors: merge one tensor after the other"
            )
        found: Tensor = _Look.apply(look, *tensors)  # type: ignore[no-untyped-call]
        return found, None


def _differentiable(job: Job, base: Tensor, models: Sequence[FineTuned], merged: Tensor) -> Tensor:
    """Return the merged values as a function of the tensors."""
    tensors = [model.tensor for model in models]
    terms = [term._replace(theta=tensors[term.model].reshape(-1)) for term in job.terms]
    job = job._replace(theta_0=base.reshape(-1), terms=terms)
    result = formula.merge(job, slice(0, base.numel())).view(base.shape)
    # 0 - x keeps -0.0; infinities, equal in all models, have no derivative.
    merged = merged - (result.detach() - result).nan_to_num().to(merged.dtype)
    for k in set(range(len(models))) - {term.model for term in terms}:
        nothing = torch.where(torch.ones_like(base, dtype=torch.bool), 0, tensors[k])
        merged = merged - nothing.to(merged.dtype)  # its derivative is 0, not missing
    return merged
