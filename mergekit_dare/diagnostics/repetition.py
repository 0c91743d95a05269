"""Merging one tensor of a plan again: as it was planned, or with one setting changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from mergekit.common import dtype_from_name
from mergekit.io.tasks import SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_dare.diagnostics.plan import tasks
from mergekit_dare.kernel.rounding import Rounding
from mergekit_dare.kernel.sampling import Sampling


def merge_again(
    save: SaveTensor, kept: dict[Any, Any], options: MergeOptions, **changes: Any
) -> Tensor | None:
    """Merge one tensor as mergekit does; ``None`` if it is optional, and no model has it.

    Args:
        save: The tensor and its task.
        kept: What is kept from one tensor to the next: the tokenizer.
        options: mergekit's own; only ``device`` is used.
        changes: Shared parameters that replace the config's.

    """
    task = save.tensor_task
    assert isinstance(task, ExecuteMergeMethodTask)
    inputs = tasks.loaded(task, kept)
    if options.device not in (None, "cpu"):
        inputs = {k: None if t is None else t.to(options.device) for k, t in inputs.items()}
    if changes:
        parameters = type(task.parameters)(dict(task.parameters.items()) | changes)
        task = task.model_copy(update={"parameters": parameters})
    merged: Tensor | None = task.execute(tensors=inputs)
    if merged is None:
        return None
    dtype = dtype_from_name(save.dtype)
    return (merged if dtype is None else merged.to(dtype)).cpu()


def what_it_is(save: SaveTensor, stored: Tensor, options: MergeOptions) -> str | None:
    """Say what a stored tensor is instead of the merge; ``None`` if that cannot be told.

    Nothing is guessed: the tensor it names was merged or read again, and is identical to the byte.
    """
    task = save.tensor_task
    assert isinstance(task, ExecuteMergeMethodTask)
    if not bool(stored.count_nonzero()):
        return "all zeros"
    for model, tensor in tasks.loaded(task, {}).items():
        if tensor is not None and is_same(tensor.to(stored.dtype), stored):
            role = "the base model's" if model == task.base_model else f"that of {model}"
            return f"{role}, not a merge"
    for what, attempt in _attempts(save, options):
        try:
            merged = attempt()
        except Exception:  # this attempt makes no sense for this merge
            continue
        if merged is not None and is_same(merged.to(stored.dtype), stored):
            return what
    return None


def _attempts(
    save: SaveTensor, options: MergeOptions
) -> Iterator[tuple[str, Callable[[], Tensor | None]]]:
    """Yield other merges, each in words and as a function."""
    task = save.tensor_task
    assert isinstance(task, ExecuteMergeMethodTask)
    shared = dict(task.parameters.items())
    seeds = [seed for seed in (0, options.random_seed, 42, 1) if seed is not None]
    changes: list[tuple[str, Any]] = [("seed", seed) for seed in seeds]
    changes += [("sampling", sampling.value) for sampling in Sampling]
    changes += [("rounding", rounding.value) for rounding in Rounding]
    for name, value in dict.fromkeys(changes):
        if name in shared and shared[name] != value:
            what = f"the merge with {name}: {value}, but the config has {shared[name]}"
            yield what, partial(merge_again, save, {}, options, **{name: value})
    for dtype in ("float32", "bfloat16", "float16"):
        what = f"the merge of {dtype} inputs, rounded afterwards (dtype, out_dtype)"
        yield what, partial(_merge_from, dtype, save, options)


def _merge_from(dtype: str, save: SaveTensor, options: MergeOptions) -> Tensor | None:
    return merge_again(_with_dtype(save, dtype), {}, options)


def _with_dtype(save: SaveTensor, dtype: str) -> SaveTensor:
    """Return the same save, with inputs that are converted to a dtype when they are read."""
    task = save.tensor_task
    assert isinstance(task, ExecuteMergeMethodTask)
    gather = tasks.gathered(task).model_copy(update={"dtype": dtype})
    if not tasks.aligns_tokens(task):
        task = task.model_copy(update={"gather_tensors": gather})
    else:
        aligned = task.gather_tensors.model_copy(update={"gather_tensors": gather})
        task = task.model_copy(update={"gather_tensors": aligned})
    return save.model_copy(update={"tensor_task": task})


def is_same(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors are identical to the byte."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return bool(torch.equal(bits(first), bits(second)))


def bits(tensor: Tensor) -> Tensor:
    """Return a tensor's elements as integers of their size, shape (elements,)."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(-1).view(integers[tensor.element_size()])
