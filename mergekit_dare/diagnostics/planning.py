"""What mergekit plans to do for a config.

Its own planners are run, and its own tasks; nothing is written.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from mergekit import merge_methods
from mergekit.architecture import ModelArchitecture, get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.graph import Task
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import GatherTensors, LoaderCache, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.scripts import merge_raw_pytorch
from mergekit.tokenizer import BuildTokenizer, PermutedVocabulary
from mergekit.tokenizer.truncate import TruncatedVocabulary
from torch import Tensor

from mergekit_dare.diagnostics import model_files
from mergekit_dare.diagnostics.document import Document, plain
from mergekit_dare.diagnostics.findings import UnusableFileError
from mergekit_dare.diagnostics.host import configuration
from mergekit_dare.kernel.formula import SUPPORTED_DTYPES
from mergekit_dare.kernel.merging import FineTuned, Recipe
from mergekit_dare.plugin.methods import DareMethod


def plan(
    config: MergeConfiguration,
    options: MergeOptions,
    *,
    merge_adapters: bool = True,
    names: Mapping[ModelReference, Iterable[str]] | None = None,
) -> tuple[ModelArchitecture, list[SaveTensor]]:
    """Return what mergekit makes of a config's models, and the tensors that it would save.

    Args:
        config: As mergekit has it; left as it is.
        options: Those that mergekit-yaml would be given.
        merge_adapters: Whether adapters may be merged into their models, which is work and
            needs ``lora_merge_cache``; else the models stand in for them.
        names: The stored tensors of models that are not on this machine, and are not to be
            fetched.

    Raises:
        Exception: whatever mergekit raises: the models do not fit, or their files are not there.

    """
    config = config.model_copy(deep=True)
    architecture = get_architecture_info(config, options)
    cache = LoaderCache()
    cache.setup(options=options)
    # It keeps what it has read of a model; the files may have changed since.
    cache.loaders.clear()
    for model, stored in (names or {}).items():
        paths = dict.fromkeys(stored, "not fetched")
        index = ShardedTensorIndex("", is_safetensors=True, tensor_paths=paths, shards=[])
        cache.loaders[model] = LazyTensorLoader(index, lazy_unpickle=False)
    if not merge_adapters:
        for model in filter(lambda model: model.lora, config.referenced_models()):
            if model in cache.loaders:
                continue
            plain = ModelReference(model=model.model)
            cache.loaders[model] = plain.lazy_loader(cache_dir=options.transformers_cache)
    donor = config.base_model or config.referenced_models()[0]
    out_config = donor.config(trust_remote_code=options.trust_remote_code)
    planner = MergePlanner(config, architecture, options, out_config)
    # Planning writes nothing: the folder would be made when the tasks are run.
    tasks = planner.plan_to_disk("unused")
    return architecture, [task for task in tasks if isinstance(task, SaveTensor)]


@contextmanager
def cached_adapters(options: MergeOptions) -> Iterator[MergeOptions]:
    """Give the options a folder for adapters that are merged into models, if they have none."""
    if options.lora_merge_cache is not None:
        yield options
        return
    with TemporaryDirectory(prefix="mergekit-dare-") as cache:
        yield options.model_copy(update={"lora_merge_cache": cache})


def plan_document(
    document: Document, options: MergeOptions
) -> tuple[ModelReference | None, list[SaveTensor]]:
    """Return the base model of a config, and what mergekit-yaml or mergekit-pytorch would save.

    Raises:
        UnusableFileError: a local model's files are damaged, missing or quantized.
        Exception: whatever mergekit raises.

    """
    config = configuration(document)
    paths = [Path(model.model.path) for model in config.referenced_models()]
    for path in filter(Path.exists, paths):
        for problem in model_files.examine(path).problems:
            raise UnusableFileError(problem)
    if any(path.is_file() for path in paths):
        return plan_single_files(plain(document.root), options)
    return config.base_model, plan(config, options)[1]


def plan_single_files(
    document: Mapping[str, Any], options: MergeOptions
) -> tuple[ModelReference | None, list[SaveTensor]]:
    """Return the base model of a config for mergekit-pytorch, and what it would save.

    Tensors that some files lack are left out, as with ``--tensor-intersection``.
    """
    config = merge_raw_pytorch.RawPyTorchMergeConfig.model_validate(document)
    with redirect_stderr(io.StringIO()):  # progress bars of planning, which takes no time
        tasks = merge_raw_pytorch.plan_flat_merge(config, "unused", False, True, options)
    base = config.base_model
    saves = [save for save in cast(list[Any], tasks) if isinstance(save, SaveTensor)]
    reference = None if base is None else ModelReference.model_validate({"model": {"path": base}})
    return reference, sorted(saves, key=lambda save: save.tensor_name)


def take_seed(options: MergeOptions) -> None:
    """Let merges without a ``seed`` take that of ``--random-seed``, as mergekit's commands do."""
    if options.random_seed is not None:
        torch.manual_seed(options.random_seed)


def loaded(task: ExecuteMergeMethodTask, results: dict[Task[Any], Any]) -> dict[Any, Tensor]:
    """Run what a task needs, and return its inputs by model, vocabularies aligned.

    Args:
        task: One of the plan.
        results: What is kept from one task to the next: the tokenizer.

    """
    inputs: dict[Any, Tensor] = _run(task.gather_tensors, results)
    return inputs


def recipe_of(task: ExecuteMergeMethodTask) -> Recipe | None:
    """Return what is the same for all models of a task; ``None`` if it is not one of ours."""
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
    """Let mergekit build the tokenizer of a plan, if it is to have one; nothing is written.

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


def aligns_tokens(task: ExecuteMergeMethodTask) -> bool:
    """Tell whether a task brings the rows of several vocabularies into one order."""
    return isinstance(task.gather_tensors, PermutedVocabulary | TruncatedVocabulary)
