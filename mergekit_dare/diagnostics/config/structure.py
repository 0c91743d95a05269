"""Rules on the parts of a config: its keys, its merge method, its models and its slices.

mergekit silently ignores what it does not know, so a config with a misspelled ``density`` merges
without dropping anything. The rules of this room are for what mergekit silently ignores; what it
refuses, mergekit itself is asked about in ``refusals``.
"""

from __future__ import annotations

from collections.abc import Iterator

from mergekit import config as mergekit_config
from mergekit import merge_methods
from mergekit.merge_methods import BasePolicy
from pydantic import BaseModel
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mergekit_dare.diagnostics.config.document import Document
from mergekit_dare.diagnostics.config.nodes import (
    children,
    entries,
    get,
    plain,
    reference,
    slices,
)
from mergekit_dare.diagnostics.findings import Severity, did_you_mean, shown
from mergekit_dare.diagnostics.rules import Findings, rule

WARNING, HINT = Severity.WARNING, Severity.HINT
# Keys that configs of other mergekit commands have, and merge configs never.
OTHER_COMMANDS = {"experts": "mergekit-moe", "genome": "mergekit-evolve"}


@rule
def other_command(document: Document) -> Findings:
    """Find a config that is meant for another mergekit command."""
    for key, command in OTHER_COMMANDS.items():
        if (node := get(document.root, key)) is not None and get(document.root, "models") is None:
            message = f"this config is for {command}, not mergekit-yaml; check does not support it"
            yield document.finding(node, message)


@rule
def unknown_merge_method(document: Document) -> Findings:
    """Find a merge method that is missing, or that mergekit does not have."""
    node = get(document.root, "merge_method")
    if node is None:
        yield document.finding(document.root, "merge_method is missing")
    elif document.spec is None:
        known = [method.spec.name for method in merge_methods.registered_methods()]
        name = shown(plain(node))
        near = did_you_mean(name, known)
        yield document.finding(node, f"mergekit has no merge method {name}{near}")


def _places(document: Document) -> Iterator[tuple[MappingNode, type[BaseModel], str]]:
    """Yield every mapping whose keys mergekit defines, with its class and a name for its level."""
    yield document.root, mergekit_config.MergeConfiguration, "the top level"
    for module in document.modules.values():
        yield module, mergekit_config.OutputModuleDefinition, "the module level"
    for holder in document.holders:
        for part in slices(holder):
            yield part, mergekit_config.OutputSliceDefinition, "the slice level"
    for inputs in document.input_lists:
        kind: type[BaseModel] = mergekit_config.InputModelDefinition
        if inputs.is_slice:
            kind = mergekit_config.InputSliceDefinition
        for model in inputs.models:
            yield model, kind, "the model level"
    for _, _, node, _ in document.settings():
        for condition in [node] if isinstance(node, MappingNode) else children(node):
            if isinstance(condition, MappingNode):
                yield condition, mergekit_config.ConditionalParameter, "the filter level"


def _strange_keys(document: Document) -> Iterator[tuple[ScalarNode, list[str], str]]:
    """Yield every key that mergekit ignores, with the keys that it knows there, and the level."""
    for mapping, kind, place in _places(document):
        known = [*kind.model_fields]
        allowed = [*known, "name"] if mapping is document.root else known
        for key, _ in entries(mapping):
            if str(key.value) not in allowed:
                yield key, known, place


def _all_parameters() -> set[str]:
    methods = merge_methods.registered_methods()
    return {parameter.name for method in methods for parameter in method.spec.parameters}


def _is_our_int8_mask(document: Document, name: str) -> bool:
    return name == "int8_mask" and document.has_our_method


@rule
def unknown_key(document: Document) -> Findings:
    """Find a key that mergekit does not know and silently ignores."""
    for key, known, place in _strange_keys(document):
        name = str(key.value)
        if name not in _all_parameters():
            near = did_you_mean(name, known)
            message = f"mergekit has no key {shown(name)} at {place} and ignores it{near}"
            yield document.finding(key, message, Severity.ERROR if near else WARNING)


@rule
def misplaced_parameter(document: Document) -> Findings:
    """Find a parameter outside parameters:, where it has no effect."""
    for key, _, place in _strange_keys(document):
        name = str(key.value)
        if name in _all_parameters() and not _is_our_int8_mask(document, name):
            message = f"{name} has no effect at {place}; put it under parameters:"
            yield document.finding(key, message)


@rule
def misplaced_int8_mask(document: Document) -> Findings:
    """Find an int8_mask outside parameters:, which has no effect anywhere."""
    for key, _, _ in _strange_keys(document):
        if _is_our_int8_mask(document, str(key.value)):
            yield document.finding(key, "int8_mask has no effect: no mask is stored", HINT)


@rule
def repeated_key(document: Document) -> Findings:
    """Find a key that appears twice in one mapping."""
    for mapping in _all_mappings(document.root):
        seen: set[str] = set()
        for key, _ in entries(mapping):
            # A key that a YAML merge key brought in may be overridden.
            if not mapping.start_mark.index <= key.start_mark.index < mapping.end_mark.index:
                continue
            name = str(key.value)
            if name in seen:
                message = f"{shown(name)} appears here twice; only the last one counts"
                yield document.finding(key, message)
            seen.add(name)


def _all_mappings(node: Node) -> Iterator[MappingNode]:
    """Yield every mapping of a document once."""
    seen: set[int] = set()
    rest = [node]
    while rest:
        node = rest.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, MappingNode):
            yield node
        rest += children(node)


@rule
def malformed_list(document: Document) -> Findings:
    """Find models: or slices: that is not a list of mappings."""
    for holder in document.holders:
        for key, entry in (("models", "model"), ("slices", "sources")):
            node = get(holder, key)
            if node is None:
                continue
            if not isinstance(node, SequenceNode):
                yield document.finding(node, f"{key} must be a list: write - {entry}: with a dash")
                continue
            for item in node.value:
                if not isinstance(item, MappingNode):
                    hint = f"write - {entry}: {shown(plain(item))}" if key == "models" else ""
                    hint = hint or "write - sources:"
                    yield document.finding(item, f"each entry of {key} must be a mapping: {hint}")
                elif key == "slices" and not isinstance(get(item, "sources"), SequenceNode):
                    yield document.finding(item, "a slice needs a list under sources:")


@rule
def unreadable_model(document: Document) -> Findings:
    """Find a model without a name, or with one that mergekit cannot parse."""
    base_node = get(document.root, "base_model")
    slice_bases = [get(part, "base_model") for h in document.holders for part in slices(h)]
    for named in filter(None, [base_node, *slice_bases]):
        if reference(named) is None:
            yield document.finding(named, _no_reference(named))
    for inputs in document.input_lists:
        for model in inputs.models:
            node = get(model, "model")
            if node is None:
                yield document.finding(model, "model is missing; give the model's path or name")
            elif reference(node) is None:
                yield document.finding(node, _no_reference(node))


def _no_reference(node: Node) -> str:
    return (
        f"mergekit cannot parse {shown(plain(node))} as a model: it takes PATH, PATH@REVISION "
        "and MODEL+ADAPTER, with at most one @ and one +"
    )


@rule
def repeated_model(document: Document) -> Findings:
    """Find a model that is listed twice."""
    for inputs in document.input_lists:
        seen = set()
        for model in inputs.models:
            node = get(model, "model")
            found = None if node is None else reference(node)
            if node is None or found is None:
                continue
            if found in seen:
                yield document.finding(node, f"{found} is listed twice, which mergekit refuses")
            seen.add(found)


@rule
def missing_base_model(document: Document) -> Findings:
    """Find a merge without the base model that its method needs."""
    spec = document.spec
    if spec is None or spec.contract.base != BasePolicy.REQUIRED:
        return
    for inputs in document.input_lists:
        if inputs.base_node is None:
            message = (
                f"{spec.name} needs base_model: the model that the others were fine-tuned from"
            )
            yield document.finding(inputs.node, message)


@rule
def no_fine_tuned_model(document: Document) -> Findings:
    """Find a merge of the base model alone."""
    if not document.has_our_method:
        return
    lists = document.input_lists
    named = any(inputs.references for inputs in lists)
    if named and not any(set(inputs.references) - {inputs.base} for inputs in lists):
        message = "there is no fine-tuned model, so the result is the base model"
        yield document.finding(lists[0].node, message)


@rule
def invalid_layer_range(document: Document) -> Findings:
    """Find a slice whose layer ranges are missing, malformed, or of different lengths."""
    for holder in document.holders:
        lengths: list[int] = []
        for inputs in document.input_lists:
            if not inputs.is_slice or holder is not inputs.scopes[-2]:
                continue
            of_slice = set()
            for model in inputs.models:
                node = get(model, "layer_range")
                if node is None:
                    message = "layer_range is missing; give [FIRST, LAST + 1]"
                    yield document.finding(model, message)
                    continue
                value = plain(node)
                if not isinstance(value, list) or len(value) != 2 or not all(map(_is_whole, value)):
                    message = f"layer_range is {shown(value)}, but must be [FIRST, LAST + 1]"
                    yield document.finding(node, message)
                    continue
                if value[1] < value[0] or value[0] < 0:
                    yield document.finding(
                        node, f"layer_range {value} begins below 0, or ends before it begins"
                    )
                of_slice.add(value[1] - value[0])
            if len(of_slice) > 1:
                message = "all sources of a slice need the same number of layers"
                yield document.finding(inputs.node, message)
            lengths += of_slice
        if lengths and not any(lengths):
            yield document.finding(
                holder, "no slice has any layers, so the merged model would have none"
            )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


RULES = (
    unknown_merge_method,
    unknown_key,
    misplaced_parameter,
    misplaced_int8_mask,
    repeated_key,
    malformed_list,
    unreadable_model,
    repeated_model,
    missing_base_model,
    no_fine_tuned_model,
    invalid_layer_range,
)
