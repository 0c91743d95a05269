"""Rules on mergekit's plan: what it would load is compared with what the headers list."""

from __future__ import annotations

import functools
import math
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import constants
from mergekit import merge_methods
from mergekit.common import ModelReference, dtype_from_name
from mergekit.merge_methods import OptionalTensorPolicy
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask

from mergekit_dare.diagnostics.config.nodes import get
from mergekit_dare.diagnostics.findings import Severity, are, cut, reason, some_tensors
from mergekit_dare.diagnostics.plan import completeness, tasks
from mergekit_dare.diagnostics.plan.completeness import BY_NAME, have_the_same_names, is_whole
from mergekit_dare.diagnostics.plan.filters import unmatched_filter
from mergekit_dare.diagnostics.plan.merge_plan import MergePlan
from mergekit_dare.diagnostics.rules import Findings, rule
from mergekit_dare.kernel.formula import dtype_name
from mergekit_dare.plugin.headers import DTYPES


@rule
def missing_in_a_file(plan: MergePlan) -> Findings:
    """Find a tensor that is missing from one of several single files."""
    base = plan.donor
    for model in plan.nodes:
        ours, theirs = (plan.models[m].files.tensors for m in (base, model))
        missing = [name for name in ours if name not in theirs]
        if ours and theirs and missing:  # else pickled: names are not known
            message = (
                f"{some_tensors(missing)} of {base} {are(missing)} missing from {model}; "
                "mergekit-pytorch needs --tensor-intersection or --tensor-union"
            )
            yield plan.finding(model, message, Severity.WARNING)


@rule
def different_shape_in_a_file(plan: MergePlan) -> Findings:
    """Find a tensor whose shape differs between single files."""
    base = plan.donor
    for model in plan.nodes:
        ours, theirs = (plan.models[m].files.tensors for m in (base, model))
        for name in ours.keys() & theirs.keys():
            if ours[name].shape != theirs[name].shape:
                shapes = f"{theirs[name].shape} in {model} but {ours[name].shape} in {base}"
                yield plan.finding(model, f"tensor {name} has shape {shapes}")
                break


@rule
def missing_layers(plan: MergePlan) -> Findings:
    """Find a layer range that ends beyond the model's last layer."""
    for part in plan.config.slices or []:
        for source in part.sources:
            count, last = plan.layers.get(source.model), source.layer_range[1]
            if count is not None and last > count:
                message = f"layer_range ends at {last}, but {source.model} has only {count} layers"
                yield plan.finding(source.model, message)


@rule
def refused_plan(plan: MergePlan) -> Findings:
    """Find a merge that mergekit cannot plan."""
    if plan.refusal is not None:
        advice = f"; {BY_NAME}" if have_the_same_names(plan) else ""
        refusal = cut(plan.refusal).rstrip(".")
        yield plan.finding(None, f"mergekit cannot plan this merge: {refusal}{advice}")


@rule
def refused_tokenizer(plan: MergePlan) -> Findings:
    """Find a tokenizer that mergekit cannot build."""
    try:
        tasks.build_tokenizer(plan.saves)
    except Exception as error:
        root = plan.document.root
        keys = (get(root, key) for key in ("tokenizer", "tokenizer_source"))
        node = next((key for key in keys if key is not None), root)
        message = f"mergekit cannot build the tokenizer: {cut(reason(error))}"
        yield plan.document.finding(node, message)


@rule
def missing_tensor(plan: MergePlan) -> Findings:
    """Find a tensor that the merge needs and a model does not have."""
    missing: dict[ModelReference, list[str]] = {}
    for tensor in plan.tensors:
        lacking = [model for model, stored in tensor.inputs.items() if stored is None]
        weight = tensor.task.output_weight
        if not tensor.is_known or (weight.optional and not _must_be_whole(tensor.task, lacking)):
            continue
        for model in lacking:
            missing.setdefault(model, []).append(weight.name)
    donor = plan.donor
    asked_in_vain = missing[donor] if donor in missing and is_whole(plan) else []
    if asked_in_vain:
        message = (
            f"mergekit's description of this architecture asks for {some_tensors(asked_in_vain)}, "
            f"which {donor} does not have, and does not need; {BY_NAME}"
        )
        yield plan.finding(donor, message)
    for model, names in missing.items():
        names = [name for name in names if name not in asked_in_vain]
        if names:
            message = (
                f"the merge needs {some_tensors(names)}, which {are(names)} missing from {model}"
            )
            yield plan.finding(model, message)


def _must_be_whole(task: ExecuteMergeMethodTask, lacking: list[ModelReference]) -> bool:
    """Tell whether mergekit refuses to merge an optional tensor that some models do not have."""
    method = merge_methods.get(task.method_name)
    present = [model for model in task.model_order if model not in lacking]
    if not lacking or not present:
        return False
    if method.spec.optional_tensor_policy != OptionalTensorPolicy.ERROR and len(present) == 1:
        return False
    try:
        method.validate_inputs(present, task.base_model, group_name=task.output_weight.name)
    except ValueError:
        return True
    return False


@rule
def different_shape(plan: MergePlan) -> Findings:
    """Find a tensor whose shape differs from the base model's, the first one of each model."""
    named: set[ModelReference] = set()
    for tensor in plan.tensors:
        task = tensor.task
        present = {model: stored for model, stored in tensor.inputs.items() if stored is not None}
        if len(present) < 2:
            continue
        first = task.base_model if task.base_model in present else next(iter(present))
        assert first is not None
        axis = task.output_weight.vocabulary_axis
        aligns_tokens = tasks.aligns_tokens(task)
        for model, stored in present.items():
            wanted, shape = present[first].shape, stored.shape
            if aligns_tokens and axis is not None:
                wanted, shape = (s[:axis] + s[axis + 1 :] for s in (wanted, shape))
            if shape == wanted or model in named:
                continue
            named.add(model)
            is_vocabulary = axis is not None and not aligns_tokens
            hint = "; the vocabularies differ: set tokenizer_source" if is_vocabulary else ""
            shapes = f"{stored.shape} in {model} but {present[first].shape} in {first}"
            yield plan.finding(model, f"tensor {task.output_weight.name} has shape {shapes}{hint}")


@rule
def tokens_without_rows(plan: MergePlan) -> Findings:
    """Find tokens of the merged model's tokenizer for which its embeddings have no row."""
    donor = plan.donor
    vocabulary = plan.models[donor].vocabulary
    if vocabulary is None or plan.config.tokenizer or plan.config.tokenizer_source:
        return  # with these, mergekit makes a row for each token
    for tensor in plan.tensors:
        axis, stored = tensor.task.output_weight.vocabulary_axis, tensor.inputs.get(donor)
        if axis is None or stored is None or axis >= len(stored.shape):
            continue
        rows = stored.shape[axis]
        beyond = [token for token, number in vocabulary.ids.items() if number >= rows]
        if beyond:
            message = (
                f"the tokenizer of {donor} has {len(beyond)} token{'s' if beyond[1:] else ''} "
                f"({cut(', '.join(map(repr, beyond[:3])))}) beyond the {rows} rows of its "
                f"embeddings ({tensor.task.output_weight.name}): using them with the merged model "
                "fails; set tokenizer_source: base, which makes a row for each"
            )
            yield plan.finding(donor, message, Severity.WARNING)
        return


@rule
def mixed_dtypes(plan: MergePlan) -> Findings:
    """Find models whose dtypes differ, without a dtype in the config: the result is wider."""
    if plan.config.dtype or plan.config.out_dtype:
        return
    donor = plan.donor
    for tensor in plan.tensors:
        stored = {m: DTYPES[s.dtype] for m, s in tensor.inputs.items() if s and s.dtype in DTYPES}
        own = stored.get(donor)
        result = functools.reduce(torch.promote_types, stored.values()) if stored else own
        if own is None or not own.is_floating_point or result == own:
            continue
        model = next(model for model, dtype in stored.items() if dtype != own)
        names = [dtype_name(dtype) for dtype in (own, stored[model], result) if dtype is not None]
        message = (
            f"the weights of {donor} are in {names[0]} and those of {model} in {names[1]}: without "
            f"a dtype, mergekit writes {names[2]} beside a config.json that says {names[0]}; set "
            f"dtype: {names[0]}"
        )
        yield plan.finding(model, message, Severity.WARNING)
        return


@rule
def weights_on_the_hub(plan: MergePlan) -> Findings:
    """Find weights that the merge first fetches from the hub."""
    if fetches := _fetched(plan):
        sizes = f"{_readable(fetches)} from the hub, and writes {_readable(_written(plan))}"
        message = f"the merge first fetches {sizes}"
        yield plan.finding(None, message, Severity.HINT)


@rule
def full_disk(plan: MergePlan) -> Findings:
    """Find a disk that is too full for what the merge fetches and writes."""
    writes, fetches = _written(plan), _fetched(plan)
    needs: dict[Path, int] = {Path.cwd(): writes}
    if fetches:
        cache = Path(constants.HF_HUB_CACHE)
        cache = next(folder for folder in (cache, *cache.parents) if folder.exists())
        same_disk = cache.stat().st_dev == Path.cwd().stat().st_dev
        needs = {Path.cwd(): writes + fetches} if same_disk else needs | {cache: fetches}
    for folder, needed in needs.items():
        free = shutil.disk_usage(folder).free
        if needed > free:
            message = (
                f"the merge needs {_readable(needed)} on the disk of {cut(str(folder))}, which has "
                f"{_readable(free)} free"
            )
            yield plan.finding(None, message, Severity.WARNING)


def _fetched(plan: MergePlan) -> int:
    return sum(plan.models[model].files.download for model in plan.nodes)


def _written(plan: MergePlan) -> int:
    name = plan.config.out_dtype or plan.config.dtype
    width = None if name is None else torch.empty(0, dtype=dtype_from_name(name)).element_size()
    size = 0
    for tensor in plan.tensors:
        stored = next((stored for stored in tensor.inputs.values() if stored is not None), None)
        if stored is not None:
            size += math.prod(stored.shape) * (width or _width(stored.dtype))
    return size


def _width(dtype: str) -> int:
    """Return the bytes of an element, from the name that safetensors gives its dtype."""
    bits = re.search(r"\d+", dtype)
    return 1 if bits is None else max(1, int(bits[0]) // 8)


def _readable(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 5e7 else f"{size / 1e6:,.1f} MB"


OF_SINGLE_FILES = (missing_in_a_file, different_shape_in_a_file, unmatched_filter)
# On whether mergekit can plan the merge, on the plan if it can, and on what comes out of it.
OF_PLANNING = (missing_layers, refused_plan)
OF_A_PLAN = (
    refused_tokenizer,
    missing_tensor,
    different_shape,
    tokens_without_rows,
    mixed_dtypes,
    unmatched_filter,
    weights_on_the_hub,
    full_disk,
)
OF_THE_OUTPUT = completeness.RULES
RULES = (*OF_SINGLE_FILES, *OF_PLANNING, *OF_A_PLAN, *OF_THE_OUTPUT)
