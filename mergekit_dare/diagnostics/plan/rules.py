"""Rules on mergekit's plan: what it would load is compared with what the headers say is there."""

from __future__ import annotations

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
from mergekit_dare.diagnostics.findings import Severity, cut, reason
from mergekit_dare.diagnostics.models.stored import BUFFERS
from mergekit_dare.diagnostics.plan import tasks
from mergekit_dare.diagnostics.plan.merge_plan import MergePlan
from mergekit_dare.diagnostics.rules import Findings, rule


@rule
def missing_in_a_file(plan: MergePlan) -> Findings:
    """Find a tensor that one of several single files lacks."""
    base = plan.base or plan.config.referenced_models()[0]
    for model in plan.nodes:
        ours, theirs = (plan.models[m].files.tensors for m in (base, model))
        missing = [name for name in ours if name not in theirs]
        if ours and theirs and missing:  # else pickled: names are not known
            message = (
                f"{_some(missing)} of {base} {_are(missing)} missing in {model}; mergekit-pytorch "
                "needs --tensor-intersection or --tensor-union"
            )
            yield plan.finding(model, message, Severity.WARNING)


@rule
def other_shape_in_a_file(plan: MergePlan) -> Findings:
    """Find a tensor whose shape is not the same in all single files."""
    base = plan.base or plan.config.referenced_models()[0]
    for model in plan.nodes:
        ours, theirs = (plan.models[m].files.tensors for m in (base, model))
        for name in ours.keys() & theirs.keys():
            if ours[name].shape != theirs[name].shape:
                shapes = f"{theirs[name].shape} in {model}, {ours[name].shape} in {base}"
                yield plan.finding(model, f"tensor {name} is {shapes}")
                break


@rule
def layers_that_are_not_there(plan: MergePlan) -> Findings:
    """Find a layer range that ends beyond the model's layers."""
    for part in plan.config.slices or []:
        for source in part.sources:
            count, last = plan.layers.get(source.model), source.layer_range[1]
            if count is not None and last > count:
                message = f"layer_range ends at {last}, but {source.model} has {count} layers"
                yield plan.finding(source.model, message)


@rule
def refused_plan(plan: MergePlan) -> Findings:
    """Find a merge that mergekit cannot plan."""
    if plan.refusal is not None:
        yield plan.finding(None, f"mergekit cannot plan this merge: {cut(plan.refusal)}")


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
    for model, names in missing.items():
        message = f"{_some(names)} {_are(names)} missing in {model}, which the merge needs"
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
def other_shape(plan: MergePlan) -> Findings:
    """Find a tensor of another shape than the base model's; the first one of each model."""
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
            hint = "; its vocabulary is another: set tokenizer_source" if is_vocabulary else ""
            shapes = f"{stored.shape} in {model}, {present[first].shape} in {first}"
            yield plan.finding(model, f"tensor {task.output_weight.name} is {shapes}{hint}")


@rule
def weights_on_the_hub(plan: MergePlan) -> Findings:
    """Find weights that a merge fetches from the hub first."""
    if fetches := _fetched(plan):
        sizes = f"fetches {_readable(fetches)} from the hub first, and writes "
        message = f"the merge {sizes}{_readable(_written(plan))}"
        yield plan.finding(None, message, Severity.HINT)


@rule
def full_disk(plan: MergePlan) -> Findings:
    """Find a disk without room for what the merge fetches and writes."""
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


@rule
def left_out_tensor(plan: MergePlan) -> Findings:
    """Find a tensor of the base model that is in no output: mergekit drops it without a word."""
    base = plan.base
    if base is None or plan.config.slices is not None:
        return
    files = plan.models[base].files
    used = {name for tensor in plan.tensors for name in tensor.used.get(base, ())}
    # A tied pair is stored once or twice; the plan takes the one.
    left = [name for name in files.tensors if name not in used and not name.endswith(BUFFERS)]
    if files.config.get("tie_word_embeddings"):
        left = [name for name in left if "lm_head" not in name]
    if left:
        message = (
            f"{_some(left)} of {base} {_are(left)} in no output: mergekit's description of this "
            "architecture does not name them, and the merged model will lack them"
        )
        yield plan.finding(base, message, Severity.WARNING)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"tensor {cut(names[0])}{more}"


def _are(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"


OF_SINGLE_FILES = (missing_in_a_file, other_shape_in_a_file)
# On a plan that there may not be, and on one that there is.
OF_ANY_PLAN = (layers_that_are_not_there, refused_plan)
OF_A_PLAN = (
    refused_tokenizer,
    missing_tensor,
    other_shape,
    left_out_tensor,
    weights_on_the_hub,
    full_disk,
)
RULES = (*OF_SINGLE_FILES, *OF_ANY_PLAN, *OF_A_PLAN)
