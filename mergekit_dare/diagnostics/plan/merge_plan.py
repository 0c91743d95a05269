"""What mergekit plans to do with a config and its models, and what each task would load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from mergekit.architecture import arch_info_for_config, get_architecture_info
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from yaml.nodes import Node

from mergekit_dare.diagnostics.config.document import Document
from mergekit_dare.diagnostics.config.nodes import plain
from mergekit_dare.diagnostics.findings import Finding, Severity, UnusableFileError, reason
from mergekit_dare.diagnostics.models.examined import ExaminedModels
from mergekit_dare.diagnostics.models.files import is_local
from mergekit_dare.diagnostics.plan import by_name, planning, tasks
from mergekit_dare.diagnostics.plan.planning import Planned
from mergekit_dare.plugin.headers import StoredTensor


@dataclass
class PlannedTensor:
    """A tensor of the output, and what its task would load, according to the headers.

    Attributes:
        task: What merges it.
        inputs: What is stored, by model; ``None`` where nothing fits.
        used: The names under which that is stored, by model.
        is_known: Whether all models' tensor names are known: those in pickles are not.

    """

    task: ExecuteMergeMethodTask
    inputs: dict[ModelReference, StoredTensor | None] = field(default_factory=dict)
    used: dict[ModelReference, set[str]] = field(default_factory=dict)
    is_known: bool = True


class MergePlan:
    """mergekit's plan for one config; it is made once, when it is first asked for.

    Attributes:
        document: The config, with its lines.
        config: The same as mergekit parses it.
        models: Its models.

    """

    def __init__(
        self,
        document: Document,
        config: MergeConfiguration,
        models: ExaminedModels,
        options: MergeOptions,
    ) -> None:
        self.document, self.config, self.models = document, config, models
        self._options = options

    @property
    def base(self) -> ModelReference | None:
        """The base model."""
        return self.config.base_model

    @property
    def donor(self) -> ModelReference:
        """The model whose settings the merged model takes: the base model, else the first."""
        return self.base or self.config.referenced_models()[0]

    @property
    def nodes(self) -> Mapping[ModelReference, Node]:
        """Where each model is first named."""
        return self.document.model_nodes

    def finding(
        self, model: ModelReference | None, message: str, severity: Severity = Severity.ERROR
    ) -> Finding:
        """Make a finding that points at a model's name, or at the config."""
        node = self.document.root if model is None else self.nodes[model]
        return self.document.finding(node, message, severity)

    @cached_property
    def is_of_single_files(self) -> bool:
        """Whether the models are files, as ``mergekit-pytorch`` takes them."""
        return any(Path(m.model.path).is_file() for m in self.config.referenced_models())

    @property
    def is_of_slices(self) -> bool:
        """Whether the output is put together of slices of models."""
        modules = (self.config.modules or {}).values()
        return bool(self.config.slices) or any(module.slices for module in modules)

    @property
    def _remote(self) -> list[ModelReference]:
        return [m for m in self.config.referenced_models() if not is_local(m.model.path)]

    @property
    def would_fetch_weights(self) -> bool:
        """Whether mergekit, to plan an unknown architecture, would read weights on the hub."""
        models = self.config.referenced_models() if self._remote else []
        if models and self.document.is_by_name:
            return True
        try:
            return any(arch_info_for_config(model.config()) is None for model in models)
        except Exception:  # refused_plan reports it
            return False

    @cached_property
    def layers(self) -> dict[ModelReference, int]:
        """Each model's number of layers, if it has one kind of layers and mergekit knows it."""
        try:
            return self._layers()
        except Exception:  # the plan's refusal reports it
            return {}

    def _layers(self) -> dict[ModelReference, int]:
        architecture = get_architecture_info(self.config, self._options)
        if len(architecture.modules) != 1:
            return {}
        (module,) = architecture.modules.values()
        return {
            model: module.architecture.num_layers(model.config(self._options.trust_remote_code))
            for model in self.config.referenced_models()
        }

    @property
    def saves(self) -> list[SaveTensor]:
        """The tensors that the merge would save, planned as if no model had an adapter.

        Raises:
            Exception: whatever mergekit raises: the models do not fit, or do not exist.

        """
        return self._planned.saves

    @property
    def slices(self) -> dict[str, int]:
        """The number of the slice that each tensor is of, by name; empty for single files."""
        return self._planned.slices

    @cached_property
    def _planned(self) -> Planned:
        if self.document.is_by_name:
            saves = by_name.plan(self.config, self._options, merge_adapters=False)
            return Planned(saves, {})
        if self.is_of_single_files:
            saves = planning.plan_single_files(plain(self.document.root), self._options)
            return Planned(saves, {})
        names = {model: self.models[model].files.tensors for model in self._remote}
        return planning.plan(self.config, self._options, merge_adapters=False, names=names)

    @cached_property
    def refusal(self) -> str | None:
        """Why mergekit cannot plan the merge, if it cannot."""
        try:
            if not self.document.is_by_name:
                self._layers()
            assert self.saves is not None  # they are planned now
        except Exception as error:
            return reason(error)
        return None

    def saves_to_run(self, options: MergeOptions) -> list[SaveTensor]:
        """Return the tensors that the merge would save, with tasks that can be run.

        Args:
            options: Those of this object, with ``lora_merge_cache`` if there are adapters.

        Raises:
            UnusableFileError: a local model's files are damaged, missing or quantized.
            Exception: whatever mergekit raises.

        """
        models = self.config.referenced_models()
        for model in filter(lambda model: Path(model.model.path).exists(), models):
            for problem in self.models[model].files.why_unusable:
                raise UnusableFileError(problem)
        if self.document.is_by_name:
            return by_name.plan(self.config, options)
        if self.is_of_single_files or not (self._remote or any(m.lora for m in models)):
            return self.saves
        return planning.plan(self.config, options).saves

    @cached_property
    def tensors(self) -> list[PlannedTensor]:
        """The tensors of the output, with the stored tensors that each is merged from."""
        planned = [save.tensor_task for save in self.saves]
        return [self._tensor(task) for task in planned if isinstance(task, ExecuteMergeMethodTask)]

    def _tensor(self, task: ExecuteMergeMethodTask) -> PlannedTensor:
        planned = PlannedTensor(task)
        for model, weight in tasks.input_weights(task).items():
            files = self.models[model].files
            planned.is_known &= bool(files.tensors)
            own_names = [weight.name, *(weight.aliases or ())]
            names = [*own_names, *(weight.tied_names or ())]
            name = next((name for name in names if name in files.tensors), None)
            if name is not None:
                planned.inputs[model], planned.used[model] = files.tensors[name], {name}
            else:
                model_type = str(files.config.get("model_type"))
                found = _converted(model_type, files.tensors, own_names)
                planned.inputs[model], planned.used[model] = found
        return planned


def _converted(
    model_type: str, stored: Mapping[str, StoredTensor], names: list[str]
) -> tuple[StoredTensor | None, set[str]]:
    """Let mergekit convert tensors without data, as it does for the layouts of other releases.

    It looks at all that it is given, so it is given a layer first: there may be 20,000 experts.
    """
    number = next((part for part in names[0].split(".") if part.isdecimal()), None)
    layer = {name: found for name, found in stored.items() if number in name.split(".")}
    for some in (layer, stored):
        used: set[str] = set()
        sources = {name: _source(name, found, used) for name, found in some.items()}
        for name in names:
            try:
                tensor = convert_checkpoint_tensors(model_type, sources, name)
            except Exception:  # it may not know this name
                tensor = None
            if tensor is not None:
                dtype = stored[min(used)].dtype if used else ""
                return StoredTensor(dtype, tuple(tensor.shape)), used
    return None, set()


def _source(name: str, stored: StoredTensor, used: set[str]) -> Callable[[], torch.Tensor]:
    def load() -> torch.Tensor:
        used.add(name)
        return torch.empty(stored.shape, device="meta")

    return load
