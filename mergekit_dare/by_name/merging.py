"""Merging the models of a config by the names of their tensors, into a new folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from mergekit.card import generate_card
from mergekit.common import ModelPath, ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import FinalizeModel, SaveTensor
from mergekit.multigpu_executor import MultiGPUExecutor
from mergekit.options import MergeOptions

import mergekit_dare
from mergekit_dare.by_name import small_files
from mergekit_dare.by_name.new_folder import new_folder, refuse_existing
from mergekit_dare.diagnostics.config import chat_template, reading
from mergekit_dare.diagnostics.config.document import BY_NAME
from mergekit_dare.diagnostics.examination import Examination
from mergekit_dare.diagnostics.findings import UnusableFileError
from mergekit_dare.diagnostics.models.files import looks_like_the_hubs
from mergekit_dare.diagnostics.plan import by_name, planning
from mergekit_dare.diagnostics.plan.by_name import NotByNameError
from mergekit_dare.diagnostics.verification import CARD_FILE, CONFIG_FILE


def merge(path: str, out: Path, options: MergeOptions) -> int:
    """Merge the models of a config into a folder, which is there when it is whole.

    Args:
        path: A config as mergekit-yaml takes it, with ``models``.
        out: A folder that is not there yet, or is empty.
        options: mergekit's own.

    Returns:
        The number of tensors.

    Raises:
        UnusableFileError: the config or a model cannot be used.
        NotByNameError: the config needs an architecture, or the models do not fit.
        FileExistsError: ``out`` is there already.
        Exception: whatever mergekit raises.

    """
    mergekit_dare.register()
    out = Path(os.path.abspath(out))
    refuse_existing(out)
    documents = reading.read(path)
    if len(documents) != 1:
        raise UnusableFileError(f"{path} has {len(documents)} configs: by-name takes one")
    examination = Examination(documents[0], options)
    config = examination.config
    donor = by_name.donor_of(config)
    for named in examination.named_models:
        for problem in named.model.files.why_unusable + named.model.adapter_problems:
            raise UnusableFileError(problem)
    with planning.cached_adapters(options) as options:
        saves = by_name.plan(config, options)
        files = _SmallFiles(examination, donor, options)
        source = _with_line(Path(path).read_text(encoding="utf-8"))
        card = generate_card(_named_as_paths(config), source, out.name)
        with new_folder(out) as folder:
            files.write(folder)
            _execute(saves, folder, options)
            if options.write_model_card:
                (folder / CARD_FILE).write_text(card, encoding="utf-8")
                (folder / CONFIG_FILE).write_text(source, encoding="utf-8")
    return len(saves)


class _SmallFiles:
    """What the output has beside its weights; nothing if its donor is a single file."""

    def __init__(
        self, examination: Examination, donor: ModelReference, options: MergeOptions
    ) -> None:
        self._config, self._donor = examination.config, donor
        self._folder: Path | None = None
        self._tokenizer: Path | None = None
        self._template: str | None = None
        source = _tokenizer_of(examination, donor)
        if Path(donor.model.path).is_file():
            if self._config.chat_template:
                raise NotByNameError(f"chat_template is set, but {donor} is a file of weights")
            return
        self._folder = small_files.folder_of(donor, options)
        if options.copy_tokenizer or source != donor:
            self._tokenizer = small_files.folder_of(source, options)
        if self._config.chat_template:
            if self._tokenizer is None or examination.models[source].vocabulary is None:
                raise NotByNameError(f"chat_template is set, but no tokenizer of {source} is taken")
            self._template = chat_template.text_of(self._config)
        models = [m for m in self._config.referenced_models() if m.model != donor.model]
        folders = [small_files.folder_of(m, options) for m in models]
        small_files.refuse_other_inner_weights(self._folder, folders)

    def write(self, out: Path) -> None:
        """Write them."""
        if self._folder is None:
            return
        small_files.copy(self._folder, self._tokenizer, out)
        small_files.write_settings(out, self._config, self._donor)
        if self._template is not None:
            small_files.write_chat_template(out, self._template)


def _tokenizer_of(examination: Examination, donor: ModelReference) -> ModelReference:
    """Return the model whose tokenizer the output takes.

    Raises:
        NotByNameError: rows of the embeddings would have to be moved.

    """
    config = examination.config
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    if source is None:
        return donor
    needs = "which tensors have rows of tokens is not told by names; merge with mergekit-yaml"
    if source == "union":
        raise NotByNameError(f"a union of tokenizers brings rows into another order: {needs}")
    if config.tokenizer and (config.tokenizer.tokens or config.tokenizer.pad_to_multiple_of):
        raise NotByNameError(f"tokens and pad_to_multiple_of of tokenizer change rows: {needs}")
    chosen = donor if source == "base" else source
    assert isinstance(chosen, ModelReference)
    known = examination.models[chosen].vocabulary
    if known is None:
        raise NotByNameError(f"tokenizer_source is {chosen}, which has no tokenizer")
    for model in config.referenced_models():
        other = examination.models[model].vocabulary
        if other is not None and other.ids != known.ids:
            raise NotByNameError(f"{model} has other tokens than {chosen}: {needs}")
    return chosen


def _execute(saves: list[SaveTensor], out: Path, options: MergeOptions) -> None:
    """Merge and write each tensor as mergekit-yaml does."""
    writer = saves[0].writer_task.model_copy(update={"out_path": str(out)})
    saves = [save.model_copy(update={"writer_task": writer}) for save in saves]
    tasks = [*saves, FinalizeModel(tensor_save_tasks=tuple(saves), writer_task=writer)]
    device = torch.device(options.device or "cpu")
    storage = device if options.low_cpu_memory else torch.device("cpu")
    executor: Executor | MultiGPUExecutor = (
        MultiGPUExecutor(tasks, storage_device=None if options.low_cpu_memory else storage)
        if options.multi_gpu
        else Executor(tasks, math_device=device, storage_device=storage)
    )
    for _ in executor.run(quiet=options.quiet):
        pass


def _with_line(source: str) -> str:
    """Return a config's text with the line that tells how it was merged."""
    source = source.removeprefix("\ufeff")
    return source if BY_NAME in source.splitlines() else f"{BY_NAME}\n{source}"


def _named_as_paths(config: MergeConfiguration) -> MergeConfiguration:
    """Return a config whose folders do not look like names of the hub.

    For the card, mergekit asks the hub about those, and fails without a network.
    """

    def path(model: ModelPath | None) -> ModelPath | None:
        if model is None or not looks_like_the_hubs(model.path):
            return model
        return model.model_copy(update={"path": f"./{model.path}"})

    def reference(model: ModelReference) -> ModelReference:
        return model.model_copy(update={"model": path(model.model), "lora": path(model.lora)})

    entries = config.models or []
    return config.model_copy(
        update={
            "base_model": None if config.base_model is None else reference(config.base_model),
            "models": [e.model_copy(update={"model": reference(e.model)}) for e in entries],
        }
    )
