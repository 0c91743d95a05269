"""The models of a config, each examined once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mergekit.common import ModelPath, ModelReference
from tqdm import tqdm

from mergekit_dare.diagnostics.models import adapters
from mergekit_dare.diagnostics.models import files as model_files
from mergekit_dare.diagnostics.models.description import ModelDescription
from mergekit_dare.diagnostics.models.files import ModelFiles, is_local
from mergekit_dare.diagnostics.models.hub import Hub


class ExaminedModels:
    """Models that have been examined, here or on the hub; several configs may share them."""

    def __init__(self) -> None:
        self._hub = Hub()
        self._files: dict[ModelPath, ModelFiles] = {}
        self._described: dict[ModelReference, ModelDescription] = {}

    def __getitem__(self, model: ModelReference) -> ModelDescription:
        """Return what is known about a model, which is examined now if it has not been yet."""
        if model not in self._described:
            described = ModelDescription(model, self._files_of(model.model))
            described.adapter_problems.extend(self._adapter_problems(described))
            self._described[model] = described
        return self._described[model]

    def look_at(self, models: Iterable[ModelReference]) -> None:
        """Examine models, with a progress bar if the hub is asked."""
        waiting = [m for m in models if m not in self._described]
        remote = [model for model in waiting if not is_local(model.model.path)]
        bar = tqdm(total=len(remote), desc="Asking the hub", disable=None if remote else True)
        with bar:
            for model in waiting:
                self[model]
                bar.update(model in remote)

    def _files_of(self, model: ModelPath) -> ModelFiles:
        if model not in self._files:
            if (problem := model_files.why_not_a_path(model.path)) is not None:
                self._files[model] = ModelFiles(problems=[problem])
            elif is_local(model.path):
                self._files[model] = model_files.examine(Path(model.path))
            else:
                self._files[model] = self._hub.examine(model)
        return self._files[model]

    def _adapter_problems(self, model: ModelDescription) -> list[str]:
        lora = model.reference.lora
        if lora is None or model.files.why_unusable:
            return []
        if (problem := model_files.why_not_a_path(lora.path)) is not None:
            return [problem]
        if is_local(lora.path):
            return adapters.problems(model, Path(lora.path))
        return self._hub.examine_adapter(lora)
