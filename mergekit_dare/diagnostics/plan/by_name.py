"""mergekit's plan for the names of stored tensors, which needs no architecture.

Every tensor of the base model is given to mergekit's planner for one tensor. Which tensors belong
together is told by their names alone, so those must be the same in all models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mergekit.architecture import ModelArchitecture, WeightInfo
from mergekit.architecture.auto import RE_LAYER_INDEX
from mergekit.common import ModelReference
from mergekit.config import (
    ConditionalParameter,
    ConfigReader,
    InputSliceDefinition,
    MergeConfiguration,
    OutputSliceDefinition,
)
from mergekit.io.tasks import SaveTensor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_dare.diagnostics.findings import are, cut
from mergekit_dare.diagnostics.models.stored import BUFFERS, is_floating, stored_tensors
from mergekit_dare.diagnostics.plan import planning
from mergekit_dare.plugin.headers import StoredTensor

EXAMPLES = 3
Stored = Mapping[str, StoredTensor]


class NotByNameError(Exception):
    """A merge that needs to know an architecture, or models whose tensors do not fit."""


def donor_of(config: MergeConfiguration) -> ModelReference:
    """Return the model whose names and settings the output takes: the base, else the first."""
    if config.models is None:
        raise NotByNameError(
            "a merge by name takes models, each as a whole: slices and modules need mergekit's "
            "description of an architecture; merge with mergekit-yaml"
        )
    return config.base_model or config.models[0].model


def plan(
    config: MergeConfiguration, options: MergeOptions, *, merge_adapters: bool = True
) -> list[SaveTensor]:
    """Return the tensors that a merge by name would save, with the tasks that make them.

    Tensors of integers and truth values are the base model's, and so are buffers of older releases
    that some models do not have.

    Args:
        config: As mergekit has it; left as it is, and its tokenizer is none of the plan's.
        options: Those that the merge is given, with ``lora_merge_cache`` if there are adapters.
        merge_adapters: As for :func:`mergekit_dare.diagnostics.plan.planning.plan`.

    Raises:
        NotByNameError: it cannot be merged by name; the message says why.
        UnusableFileError: a model's file is missing or damaged.
        Exception: whatever mergekit raises: of the method, a parameter, or a model.

    """
    donor = donor_of(config)
    # Rows of vocabularies cannot be told from others, so nothing is aligned here.
    config = config.model_copy(deep=True, update={"tokenizer": None, "tokenizer_source": None})
    cache = planning.open_models(config, options, merge_adapters=merge_adapters)
    sources = [
        InputSliceDefinition(model=entry.model, layer_range=(0, 0), parameters=entry.parameters)
        for entry in config.models or []
    ]
    if config.base_model is not None and all(s.model != config.base_model for s in sources):
        sources.append(InputSliceDefinition(model=config.base_model, layer_range=(0, 0)))
    stored = {s.model: stored_tensors(cache.get(s.model).index) for s in sources}
    for model in stored:
        _refuse_other_tensors(model, stored[model], donor, stored[donor])
    weights = [
        name
        for name, tensor in stored[donor].items()
        if is_floating(tensor) and all(name in of_model for of_model in stored.values())
    ]
    saves = _planned(config, options, sources, _positions(weights, config))
    buffers = dict.fromkeys(sorted(stored[donor].keys() - set(weights)), 0.0)
    as_stored = {"merge_method": "passthrough", "base_model": None, "parameters": None}
    as_stored |= {"dtype": None, "out_dtype": None}
    of_donor = [InputSliceDefinition(model=donor, layer_range=(0, 0))]
    return saves + _planned(config.model_copy(update=as_stored), options, of_donor, buffers)


def _planned(
    config: MergeConfiguration,
    options: MergeOptions,
    sources: list[InputSliceDefinition],
    positions: Mapping[str, float],
) -> list[SaveTensor]:
    """Let mergekit plan each tensor, by its name and its position among the layers."""
    nothing = ModelArchitecture(modules={}, architectures=[], model_type="")
    planner = MergePlanner(config.model_copy(), nothing, options, out_model_config=None)
    reader = ConfigReader(config=config, t=0, slice_out=OutputSliceDefinition(sources=sources))
    models = [source.model for source in sources]
    for name, position in positions.items():
        weights = [WeightInfo(name=name)] * len(models)
        planner.plan_tensor(weights[0], weights, models, reader.with_t(position))
    return [task for task in planner.plan_to_disk("unused") if isinstance(task, SaveTensor)]


def _refuse_other_tensors(
    model: ModelReference, theirs: Stored, donor: ModelReference, ours: Stored
) -> None:
    """Refuse a model whose weights have other names or shapes than the donor's."""
    for one, its, other, others in ((donor, ours, model, theirs), (model, theirs, donor, ours)):
        weights = [name for name in its if is_floating(its[name]) and not name.endswith(BUFFERS)]
        if lacking := [name for name in weights if name not in others]:
            raise NotByNameError(
                f"{_some(lacking)} of {one} {are(lacking)} not in {other}: to be merged by name, "
                "models need the same names; save both with the same version of transformers"
            )
    for name in filter(theirs.__contains__, ours):
        if is_floating(ours[name]) != is_floating(theirs[name]):
            dtypes = f"{theirs[name].dtype} in {model}, {ours[name].dtype} in {donor}"
            raise NotByNameError(f"tensor {name} is {dtypes}: only one of them holds weights")
        if is_floating(ours[name]) and ours[name].shape != theirs[name].shape:
            shapes = f"{theirs[name].shape} in {model}, {ours[name].shape} in {donor}"
            raise NotByNameError(
                f"tensor {name} is {shapes}: to be merged by name, models need the same shapes"
            )


def _some(names: list[str]) -> str:
    examples = _examples(names)
    return f"{len(names):,} tensors ({examples})" if len(names) > 1 else f"tensor {examples}"


def _examples(names: list[str]) -> str:
    return ", ".join(map(cut, names[:EXAMPLES])) + (", ..." if len(names) > EXAMPLES else "")


def _positions(names: Iterable[str], config: MergeConfiguration) -> dict[str, float]:
    """Return where each tensor lies between the first (0) and the last layer (1); 0 outside.

    Layers are told as mergekit tells them of an architecture that it does not know. With several
    stacks of them, which of them values are meant for is not told by names.
    """
    found = {name: match for name in names if (match := RE_LAYER_INDEX.search(name)) is not None}
    stacks = {name[: match.start()] for name, match in found.items()}
    if len(stacks) > 1:
        _refuse_gradients(config, sorted(stacks))
    last = max((int(match[1]) for match in found.values()), default=0)
    inside = {name: int(match[1]) / last if last else 1.0 for name, match in found.items()}
    return dict.fromkeys(names, 0.0) | inside


def _refuse_gradients(config: MergeConfiguration, stacks: list[str]) -> None:
    holders = [config.parameters, *(entry.parameters for entry in config.models or [])]
    for parameters in holders:
        for name, setting in (parameters or {}).items():
            if _is_gradient(setting):
                raise NotByNameError(
                    f"{name} is a list of values from the first to the last layer, but there are "
                    f"several stacks of layers ({_examples(stacks)}): give one value, or values "
                    "with filters"
                )


def _is_gradient(setting: Any) -> bool:
    if isinstance(setting, ConditionalParameter):
        return _is_gradient(setting.value)
    if not isinstance(setting, list):
        return False
    filters = [entry for entry in setting if isinstance(entry, ConditionalParameter)]
    return any(map(_is_gradient, filters)) or len(filters) < len(setting)
