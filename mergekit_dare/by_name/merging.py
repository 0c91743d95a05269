"""Merging the models of a config by the names of their tensors, into a new folder."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from mergekit.card import generate_card
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.tasks import FinalizeModel, SaveTensor
from mergekit.multigpu_executor import MultiGPUExecutor
from mergekit.options import MergeOptions

import mergekit_dare
from mergekit_dare.by_name.new_folder import new_folder, refuse_existing
from mergekit_dare.by_name.small_files import SmallFiles
from mergekit_dare.diagnostics.config import reading
from mergekit_dare.diagnostics.config.document import BY_NAME
from mergekit_dare.diagnostics.examination import Examination
from mergekit_dare.diagnostics.findings import UnusableFileError, reason
from mergekit_dare.diagnostics.plan import by_name, planning
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
        files = SmallFiles(examination, donor, options)
        texts = {}
        if options.write_model_card:
            texts[CONFIG_FILE] = _with_line(Path(path).read_text(encoding="utf-8"))
            texts[CARD_FILE] = _card(config, texts[CONFIG_FILE], out.name)
        with new_folder(out) as folder:
            files.write(folder)
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
            _execute(saves, folder, options)
    return len(saves)


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


def _card(config: MergeConfiguration, source: str, name: str) -> str:
    """Return mergekit's model card, for which it asks the hub about folders with names like there.

    mergekit-yaml does so after the merge.
    """
    try:
        return generate_card(config, source, name)
    except Exception as error:  # of the hub's client
        raise UnusableFileError(
            f"for the model card, mergekit asks the hub about models, and fails: {reason(error)}; "
            "write folders as ./NAME, or use --no-write-model-card"
        ) from error
