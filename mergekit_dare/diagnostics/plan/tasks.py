"""The tasks of a plan: loading their inputs, and reading their parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mergekit import merge_methods
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.graph import Task
from mergekit.io.tasks import GatherTensors, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask, TensorDictWrapper
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary
from mergekit.tokenizer.truncate import TruncatedVocabulary
from torch import Tensor

from mergekit_dare.kernel.formula import SUPPORTED_DTYPES
from mergekit_dare.kernel.merging import FineTuned, Recipe
from mergekit_dare.plugin.methods import DareMethod


def loaded(task: ExecuteMergeMethodTask, results: dict[Task[Any], Any]) -> dict[Any, Tensor]:
    """Load what a task needs, and return its inputs by model, with vocabularies aligned.

    Args:
        task: A task of the plan.
        results: What is kept from one task to the next: the tokenizer.

    """
    inputs: dict[Any, Tensor] = _run(task.gather_tensors, results)
    return inputs


def recipe_of(task: ExecuteMergeMethodTask) -> Recipe | None:
    """Return what is the same for all models of a task; ``None`` if its method is not ours."""
    method = merge_methods.get(task.method_name)
    if not isinstance(method, DareMethod):
        return None
    return method.recipe(task.output_weight.name, dict(task.parameters.items()))


def fine_tuned(
    task: ExecuteMergeMethodTask, tensors: Mapping[ModelReference, Tensor]
) -> list[FineTuned]:
    """Return the fine-tuned models' shares in a task of ours."""
    of_models = {model: dict(task.input_parameters[model].items()) for model in tensors}
    return [
        FineTuned(str(model), tensor, of_models[model]["weight"], of_models[model]["density"])
        for model, tensor in tensors.items()
        if tensor.dtype in SUPPORTED_DTYPES
    ]


def _run(task: Task[Any], results: dict[Task[Any], Any]) -> Any:
    if task in results:
        return results[task]
    result = task.execute(**{name: _run(t, results) for name, t in task.arguments().items()})
    if isinstance(task, BuildTokenizer):
        results[task] = result
    return result


def build_tokenizer(saves: Iterable[SaveTensor]) -> None:
    """Let mergekit build the tokenizer of a plan, if it has one; nothing is written.

    Raises:
        Exception: whatever mergekit or transformers raise.

    """
    seen: set[Task[Any]] = set()
    waiting: list[Task[Any]] = list(saves)
    while waiting:
        task = waiting.pop()
        if isinstance(task, BuildTokenizer):
            _run(task, {})
            return
        if task not in seen:
            seen.add(task)
            waiting += task.arguments().values()


def gathered(task: ExecuteMergeMethodTask) -> GatherTensors:
    """Return what a task loads, before any alignment of vocabularies."""
    gather = task.gather_tensors
    if isinstance(gather, PermutedVocabulary | TruncatedVocabulary):
        gather = gather.gather_tensors
    assert isinstance(gather, GatherTensors)
    return gather


def input_weights(task: ExecuteMergeMethodTask) -> dict[ModelReference, WeightInfo]:
    """Return what a task loads of each model: single files have it under the output's name."""
    if isinstance(task.gather_tensors, TensorDictWrapper):
        return dict.fromkeys(task.model_order, task.output_weight)
    return dict(gathered(task).weight_info.items())


def aligns_tokens(task: ExecuteMergeMethodTask) -> bool:
    """Tell whether a task aligns the rows of several vocabularies."""
    return isinstance(task.gather_tensors, PermutedVocabulary | TruncatedVocabulary)
