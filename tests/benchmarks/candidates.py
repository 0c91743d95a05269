"""What is measured: our methods, mergekit's, and the floor that memory bandwidth sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mergekit.merge_methods import MergeMethod, TensorGroup, get
from mergekit.merge_methods.generalized_task_arithmetic import (
    ConsensusMethod,
    GeneralizedTaskArithmeticMerge,
)
from mergekit.sparsify import SparsificationMethod
from torch import Tensor

from mergekit_dare.diagnostics.deltas.range_watch import RangeWatch
from mergekit_dare.kernel.merging import FineTuned
from mergekit_dare.plugin.methods import dare_linear, dare_ties

Merge = Callable[[], object]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DENSITY, WEIGHT = 0.3, 0.4
# What our methods can do beyond the plain merge.
WAYS: dict[str, dict[str, Any]] = {
    "normalized": {"normalize": True},
    "by magnitude": {"sampling": "magnitude"},
    "stochastic": {"rounding": "stochastic"},
}


def built_in(consensus: ConsensusMethod | None) -> MergeMethod:
    """Build mergekit's own DARE as its registry does."""
    return GeneralizedTaskArithmeticMerge(
        consensus_method=consensus,
        sparsification_method=SparsificationMethod.random,
        default_normalize=False,
        default_rescale=True,
        method_name="built_in",
        method_pretty_name=None,
        method_reference_url=None,
    )


def methods() -> dict[str, MergeMethod]:
    """Name every method that is measured."""
    return {
        "dare_linear": dare_linear,
        "dare_ties": dare_ties,
        "built-in linear": built_in(None),
        "built-in ties": built_in(ConsensusMethod.sum),
        "task_arithmetic": get("task_arithmetic"),
    }


def tensors(models: int, elements: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Make a base and ``models`` fine-tuned tensors of it with small deltas."""
    generator = torch.Generator().manual_seed(0)
    base = torch.empty(elements).normal_(0, 0.02, generator=generator)
    made = [base.to(dtype).to(device)]
    for _ in range(models):
        delta = torch.empty(elements).normal_(0, 0.002, generator=generator)
        made.append(delta.add_(base).to(dtype).to(device))
    return made


def merge(method: MergeMethod, inputs: list[Tensor], **more: Any) -> Merge:
    """Return a call that merges ``inputs``, the base first, as mergekit calls the method."""
    group = TensorGroup.from_tensors(inputs, base_index=0, name="model.layers.0.mlp.up_proj.weight")
    known = {parameter.name for parameter in method.spec.parameters}
    given: dict[str, Any] = {"weight": WEIGHT, "density": DENSITY}
    parameters = {name: value for name, value in given.items() if name in known} | more
    return lambda: method((group,), parameters=parameters)


def merges(inputs: list[Tensor]) -> dict[str, Merge]:
    """Name a call for every method, and for ours also for the other ways of merging."""
    calls = {name: merge(method, inputs) for name, method in methods().items()}
    for method in (dare_linear, dare_ties):
        for way, settings in WAYS.items():
            calls[f"{method.spec.name} {way}"] = merge(method, inputs, **settings)
    return calls


def range_watch(inputs: list[Tensor]) -> Merge:
    """Return a call that looks at the range of the deltas, as our methods do in each merge."""
    base, *tuned = inputs
    models = [FineTuned(str(k), theta, WEIGHT, DENSITY) for k, theta in enumerate(tuned)]
    watch = RangeWatch()
    return lambda: watch.look(base, models, "w")


def floor(inputs: list[Tensor]) -> Merge:
    """Return a call that reads every input once and writes the output once."""

    def read_and_write() -> Tensor:
        for tensor in inputs[1:]:
            tensor.view(torch.int32).max()
        return inputs[0].clone()

    return read_and_write
