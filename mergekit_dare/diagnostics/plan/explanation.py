"""What a config means: what each tensor of the merged model is made of, and with which values.

All of it is read from mergekit's own plan and from headers; no weight is read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mergekit import merge_methods
from mergekit.common import ImmutableMap, ModelReference
from mergekit.io.tasks import SaveTensor
from mergekit.merge_methods import MergeMethodSpec
from mergekit.merge_methods.base import BasePolicy
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mergekit_dare.diagnostics.plan import tasks
from mergekit_dare.diagnostics.plan.merge_plan import MergePlan, PlannedTensor
from mergekit_dare.kernel.formula import dtype_name
from mergekit_dare.plugin.headers import FLOATS, StoredTensor
from mergekit_dare.plugin.methods import DareMethod

Values = Mapping[str, Any]


@dataclass(frozen=True)
class ExplainedTensor:
    """A tensor of the merged model, and what it is made of.

    Attributes:
        name: In the merged model.
        base_model: The base model of its slice.
        inputs: The parameters of each model that it is made of, in the order of the merge; the
            base model has none in most methods.
        input_names: What the tensor is called in each of these models.
        shared: The shared parameters.
        slice: The number of its slice.
        shape: As the headers have it; ``None`` if the weights are pickled.
        dtype: In which it is saved; ``None`` if that is the method's to decide.
        lacking: Models of the config that do not have this tensor, where mergekit goes on without.
        stays: Whether it is as in the base model, but for its dtype and the order of its tokens.

    """

    name: str
    base_model: ModelReference | None
    inputs: Mapping[ModelReference, Values]
    input_names: Mapping[ModelReference, str]
    shared: Values
    slice: int
    shape: tuple[int, ...] | None
    dtype: str | None
    lacking: tuple[ModelReference, ...]
    stays: bool

    @property
    def size(self) -> int | None:
        """How many elements it has, if its shape is known."""
        return None if self.shape is None else math.prod(self.shape)

    @property
    def fine_tuned(self) -> list[ModelReference]:
        """The models that it is made of, without the base model."""
        return [model for model in self.inputs if model != self.base_model]

    @property
    def weight_sum(self) -> float | None:
        """The sum of the fine-tuned models' weights, if the method has weights."""
        weights = [self.inputs[model].get("weight") for model in self.fine_tuned]
        if not weights or not all(isinstance(weight, float) for weight in weights):
            return None
        return math.fsum(weight for weight in weights if weight is not None)


class Explanation:
    """What a config means.

    Attributes:
        plan: mergekit's plan for it.

    """

    def __init__(self, plan: MergePlan) -> None:
        self.plan = plan

    @property
    def spec(self) -> MergeMethodSpec:
        """What the merge method declares."""
        return merge_methods.get(self.plan.config.merge_method).spec

    @property
    def is_dare(self) -> bool:
        """Whether the method is one of this package."""
        return isinstance(merge_methods.get(self.plan.config.merge_method), DareMethod)

    @property
    def changes_a_base(self) -> bool:
        """Whether the method adds changes to its base model."""
        return self.is_dare or isinstance(
            merge_methods.get(self.plan.config.merge_method), GeneralizedTaskArithmeticMerge
        )

    @property
    def base(self) -> ModelReference | None:
        """The base model, if the method uses one."""
        return None if self.spec.contract.base == BasePolicy.IGNORED else self.plan.base

    @cached_property
    def tensors(self) -> list[ExplainedTensor]:
        """Every tensor of the merged model, in the order of the plan.

        Raises:
            Exception: whatever mergekit raises of a merge that it cannot plan.

        """
        merges = [s for s in self.plan.saves if isinstance(s.tensor_task, ExecuteMergeMethodTask)]
        pairs = zip(merges, self.plan.tensors, strict=True)
        return [self._explained(save, planned) for save, planned in pairs]

    @cached_property
    def models(self) -> list[ModelReference]:
        """All models that tensors are made of, the base model last."""
        found = dict.fromkeys(model for tensor in self.tensors for model in tensor.inputs)
        return sorted(found, key=lambda model: model == self.base)

    @property
    def donor(self) -> ModelReference | None:
        """The model whose config.json and tokenizer the merged model takes.

        Without a base model mergekit takes the first of a set, so any: then it is ``None``.
        """
        models = self.plan.config.referenced_models()
        return self.plan.base or (models[0] if len(models) == 1 else None)

    def _explained(self, save: SaveTensor, planned: PlannedTensor) -> ExplainedTensor:
        task = planned.task
        weights = tasks.input_weights(task)
        has_all = not planned.is_known
        here = [m for m in task.model_order if has_all or planned.inputs[m] is not None]
        base = task.base_model if task.base_model in here else here[0] if here else None
        stored = None if base is None else planned.inputs.get(base)
        return ExplainedTensor(
            name=save.tensor_name,
            base_model=task.base_model,
            inputs={model: _by_name(task.input_parameters[model]) for model in here},
            input_names={model: weights[model].name for model in here},
            shared=_by_name(task.parameters),
            slice=self.plan.slices.get(save.tensor_name, 0),
            shape=None if stored is None else stored.shape,
            dtype=self._dtype(save, task, stored),
            lacking=tuple(model for model in task.model_order if model not in here),
            stays=self._stays(task, here),
        )

    def _dtype(
        self, save: SaveTensor, task: ExecuteMergeMethodTask, stored: StoredTensor | None
    ) -> str | None:
        forced = task.output_weight.force_dtype or self.plan.config.dtype
        dtype = save.dtype or task.out_dtype or forced
        if dtype is not None:
            return str(dtype).removeprefix("torch.")
        stored_as = None if stored is None else FLOATS.get(stored.dtype)
        return None if stored_as is None else dtype_name(stored_as)

    def _stays(self, task: ExecuteMergeMethodTask, models: Collection[ModelReference]) -> bool:
        if not self.changes_a_base or task.base_model is None or task.base_model not in models:
            return False
        changes = [dict(task.input_parameters[m].items()) for m in models if m != task.base_model]
        return task.parameters["lambda"] == 0 or all(
            values["weight"] == 0 or (self.is_dare and values["density"] == 0) for values in changes
        )


def _by_name(values: ImmutableMap[str, Any]) -> Values:
    """Return parameters in the same order in every run: mergekit's maps have that of hashes."""
    return dict(sorted(values.items()))
