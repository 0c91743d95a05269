"""mergekit's own planners, run on a config; nothing is written."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import torch
from mergekit.architecture import WeightInfo, get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import ConfigReader, MergeConfiguration
from mergekit.io import LazyTensorLoader, ShardedTensorIndex
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from mergekit.scripts import merge_raw_pytorch


class Planned(NamedTuple):
    """What mergekit would do.

    Attributes:
        saves: The tensors that it would save, with the tasks that make them.
        slices: The number of the slice that each tensor is of, by name: gradients run over it.

    """

    saves: list[SaveTensor]
    slices: dict[str, int]


class _Planner(MergePlanner):
    """mergekit's planner, which notes whose slice's parameters each tensor has."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.slices: dict[str, int] = {}

    def plan_tensor(
        self,
        weight: WeightInfo,
        weights_in: list[WeightInfo],
        models: list[ModelReference],
        cfg_reader: ConfigReader,
    ) -> None:
        super().plan_tensor(weight, weights_in, models, cfg_reader)
        assert cfg_reader.module is not None
        slices = cfg_reader.module.slices or []
        found = (n for n, part in enumerate(slices) if part is cfg_reader.slice_out)
        self.slices[weight.name] = next(found, 0)


def plan(
    config: MergeConfiguration,
    options: MergeOptions,
    *,
    merge_adapters: bool = True,
    names: Mapping[ModelReference, Iterable[str]] | None = None,
) -> Planned:
    """Return what mergekit-yaml would do.

    Args:
        config: As mergekit parses it; it is not changed.
        options: Those that mergekit-yaml would be given.
        merge_adapters: Whether adapters may be merged into their models, which takes time and
            needs ``lora_merge_cache``; otherwise adapters are left out.
        names: The stored tensors of models that are not on this machine and must not be
            fetched.

    Raises:
        Exception: whatever mergekit raises: the models do not fit, or their files do not exist.

    """
    config = config.model_copy(deep=True)
    architecture = get_architecture_info(config, options)
    open_models(config, options, merge_adapters=merge_adapters, names=names)
    donor = config.base_model or config.referenced_models()[0]
    out_config = donor.config(trust_remote_code=options.trust_remote_code)
    planner = _Planner(config, architecture, options, out_config)
    # Planning writes nothing: the folder would be created only when the tasks are run.
    tasks = planner.plan_to_disk("unused")
    return Planned([task for task in tasks if isinstance(task, SaveTensor)], planner.slices)


def open_models(
    config: MergeConfiguration,
    options: MergeOptions,
    *,
    merge_adapters: bool = True,
    names: Mapping[ModelReference, Iterable[str]] | None = None,
) -> LoaderCache:
    """Return mergekit's loaders, in which are now those that it would not make in this way.

    Args:
        config: As mergekit has it; single files are opened, too.
        options: As for :func:`plan`.
        merge_adapters: As for :func:`plan`.
        names: As for :func:`plan`.

    """
    cache = LoaderCache()
    cache.setup(options=options)
    # It remembers what it has read of a model; the files may have changed since.
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
    for model in config.referenced_models():
        if Path(model.model.path).is_file():
            file = ShardedTensorIndex.from_file(model.model.path)
            cache.loaders[model] = LazyTensorLoader(file, lazy_unpickle=options.lazy_unpickle)
    return cache


@contextmanager
def cached_adapters(options: MergeOptions) -> Iterator[MergeOptions]:
    """Give the options a cache folder for merged adapters, if they have none."""
    if options.lora_merge_cache is not None:
        yield options
        return
    with TemporaryDirectory(prefix="mergekit-dare-") as cache:
        yield options.model_copy(update={"lora_merge_cache": cache})


def plan_single_files(config: Mapping[str, Any], options: MergeOptions) -> list[SaveTensor]:
    """Return the tensors that mergekit-pytorch would save, with the tasks that make them.

    Tensors that some files lack are left out, as with ``--tensor-intersection``.
    """
    checked = merge_raw_pytorch.RawPyTorchMergeConfig.model_validate(config)
    with redirect_stderr(io.StringIO()):  # progress bars of planning, which takes no time
        tasks = merge_raw_pytorch.plan_flat_merge(checked, "unused", False, True, options)
    saves = [save for save in cast(list[Any], tasks) if isinstance(save, SaveTensor)]
    return sorted(saves, key=lambda save: save.tensor_name)


def take_seed(options: MergeOptions) -> None:
    """Let merges without a ``seed`` use that of ``--random-seed``, as mergekit's commands do."""
    if options.random_seed is not None:
        torch.manual_seed(options.random_seed)
