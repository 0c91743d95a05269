"""One rule for each kind of finding in a config.

mergekit ignores what it does not know, so a misspelt ``density`` merges without dropping anything,
and says so nowhere. The rules here are for what mergekit ignores in silence; what it refuses is
asked of mergekit itself (:mod:`mergekit_dare.diagnostics.host`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mergekit import config as host_config
from mergekit import merge_methods
from mergekit.merge_methods import BasePolicy, ParameterScope
from mergekit.merge_methods.base import ParameterSpec
from pydantic import BaseModel
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mergekit_dare.diagnostics.document import (
    Document,
    Output,
    entries,
    get,
    is_null,
    parameter,
    plain,
    reference,
    settings_of,
    slices,
)
from mergekit_dare.diagnostics.findings import Finding, Severity, shown
from mergekit_dare.plugin.methods import DareMethod
from mergekit_dare.plugin.registration import OURS

Findings = Iterator[Finding]
Rule = Callable[[Document], Findings]

WARNING, HINT = Severity.WARNING, Severity.HINT
# Keys of a config that other commands of mergekit take, and which no merge config has.
OTHER_COMMANDS = {"experts": "mergekit-moe", "genome": "mergekit-evolve"}
NARROW = ("bfloat16", "float16")


def other_command(document: Document) -> Findings:
    """Find the configs of mergekit's other commands."""
    for key, command in OTHER_COMMANDS.items():
        if (node := get(document.root, key)) is not None and get(document.root, "models") is None:
            message = f"this config is for {command}, not for mergekit-yaml; check does not know it"
            yield document.finding(node, message)


def unknown_keys(document: Document) -> Findings:
    """Find keys that mergekit ignores, by the fields of its own classes."""
    places: list[tuple[MappingNode, type[BaseModel], str]]
    places = [(document.root, host_config.MergeConfiguration, "the top level")]
    for module in document.modules.values():
        places.append((module, host_config.OutputModuleDefinition, "a module's level"))
    for holder in document.holders:
        for part in slices(holder):
            places.append((part, host_config.OutputSliceDefinition, "a slice's level"))
    for output in document.outputs:
        kind: type[BaseModel] = host_config.InputModelDefinition
        if output.is_slice:
            kind = host_config.InputSliceDefinition
        places += [(model, kind, "a model's level") for model in output.models]
    for condition in _conditions(document):
        places.append((condition, host_config.ConditionalParameter, "a filter's entry"))
    for mapping, kind, place in places:
        yield from _unknown_keys(document, mapping, [*kind.model_fields], place)


def _unknown_keys(
    document: Document, mapping: MappingNode, known: list[str], place: str
) -> Findings:
    allowed = [*known, "name"] if mapping is document.root else known
    for key, _ in entries(mapping):
        name = str(key.value)
        if name in allowed:
            continue
        if name == "int8_mask" and document.spec is not None and _is_ours(document):
            yield document.finding(key, "int8_mask has no effect: no mask is stored", HINT)
        elif name in _all_parameter_names():
            message = f"{name} has no effect at {place}; put it under parameters:"
            yield document.finding(key, message)
        else:
            near = did_you_mean(name, known)
            message = f"mergekit knows no {shown(name)} at {place}{near}"
            yield document.finding(key, message, Severity.ERROR if near else WARNING)


def doubled_keys(document: Document) -> Findings:
    """Find keys that stand twice; one that came in by a merge key may be written anew."""
    for mapping in _all_mappings(document.root):
        seen: set[str] = set()
        for key, _ in entries(mapping):
            if not mapping.start_mark.index <= key.start_mark.index < mapping.end_mark.index:
                continue
            name = str(key.value)
            if name in seen:
                message = f"{shown(name)} stands here twice; only the last one counts"
                yield document.finding(key, message)
            seen.add(name)


def method(document: Document) -> Findings:
    """Find a merge method that is missing or unknown."""
    node = get(document.root, "merge_method")
    if node is None:
        yield document.finding(document.root, "merge_method is missing")
    elif document.spec is None:
        known = [method.spec.name for method in merge_methods.registered_methods()]
        name = shown(plain(node))
        near = did_you_mean(name, known)
        yield document.finding(node, f"mergekit knows no merge method {name}{near}")


def lists_of_models(document: Document) -> Findings:
    """Find lists that are none, and entries that are no mappings."""
    for holder in document.holders:
        for key, entry in (("models", "model"), ("slices", "sources")):
            node = get(holder, key)
            if node is None:
                continue
            if not isinstance(node, SequenceNode):
                yield document.finding(node, f"{key} is a list: write - {entry}: with a dash")
                continue
            for item in node.value:
                if not isinstance(item, MappingNode):
                    hint = f"write - {entry}: {shown(plain(item))}" if key == "models" else ""
                    hint = hint or "write - sources:"
                    yield document.finding(item, f"an entry of {key} is a mapping: {hint}")
                elif key == "slices" and not isinstance(get(item, "sources"), SequenceNode):
                    yield document.finding(item, "a slice has a list of sources:")


def models(document: Document) -> Findings:
    """Find models without a name, that cannot be parsed, or that are listed twice."""
    base_node = get(document.root, "base_model")
    slice_bases = [get(part, "base_model") for h in document.holders for part in slices(h)]
    for named in filter(None, [base_node, *slice_bases]):
        if reference(named) is None:
            yield document.finding(named, _no_reference(named))
    for output in document.outputs:
        seen = set()
        for model in output.models:
            node = get(model, "model")
            if node is None:
                yield document.finding(model, "model is missing: the model's path or name")
                continue
            found = reference(node)
            if found is None:
                yield document.finding(node, _no_reference(node))
            elif found in seen:
                yield document.finding(node, f"{found} is listed twice; mergekit refuses that")
            seen.add(found)


def _no_reference(node: Node) -> str:
    return (
        f"{shown(plain(node))} is no model that mergekit can parse: it takes PATH, PATH@REVISION "
        "and MODEL+ADAPTER, with one @ and one + at most"
    )


def base_models(document: Document) -> Findings:
    """Find outputs without a base or without a fine-tuned model, if the method needs them."""
    spec = document.spec
    if spec is None or spec.contract.base != BasePolicy.REQUIRED:
        return
    for output in document.outputs:
        if output.base_node is None:
            message = f"{spec.name} needs base_model: the model that all were fine-tuned from"
            yield document.finding(output.node, message)
    has_fine_tuned = any(output.fine_tuned for output in document.outputs)
    named = any(output.references for output in document.outputs)
    if named and not has_fine_tuned and _is_ours(document):
        message = "there is no fine-tuned model, so the result is the base model"
        yield document.finding(document.outputs[0].node, message)


def layer_ranges(document: Document) -> Findings:
    """Find slices whose sources do not fit together."""
    for holder in document.holders:
        lengths: list[int] = []
        for output in document.outputs:
            if not output.is_slice or holder is not output.scopes[-2]:
                continue
            ranges = [(model, get(model, "layer_range")) for model in output.models]
            of_slice = set()
            for model, node in ranges:
                if node is None:
                    message = "layer_range is missing: [FIRST, LAST + 1]"
                    yield document.finding(model, message)
                    continue
                value = plain(node)
                if not isinstance(value, list) or len(value) != 2 or not all(map(_is_whole, value)):
                    message = f"layer_range is {shown(value)}, but must be [FIRST, LAST + 1]"
                    yield document.finding(node, message)
                    continue
                if value[1] < value[0] or value[0] < 0:
                    yield document.finding(node, f"layer_range {value} ends before it begins")
                of_slice.add(value[1] - value[0])
            if len(of_slice) > 1:
                message = "all sources of a slice need the same number of layers"
                yield document.finding(output.node, message)
            lengths += of_slice
        if lengths and not any(lengths):
            yield document.finding(holder, "no slice has a layer, so the model has none")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def misplaced_parameters(document: Document) -> Findings:
    """Find parameters that the method does not know, or not at that place."""
    spec = document.spec
    if spec is None:
        return
    known = {parameter.name: parameter for parameter in spec.parameters}
    for holder, is_model in _parameter_holders(document):
        node = get(holder, "parameters")
        if node is None:
            continue
        if not isinstance(node, MappingNode):
            yield document.finding(node, "parameters is a mapping of parameter names to values")
            continue
        for key, value in entries(node):
            name = str(key.value)
            if name not in known:
                near = did_you_mean(name, known)
                message = f"{spec.name} has no parameter {shown(name)}{near}"
                yield document.finding(key, message)
            elif is_model and known[name].scope == ParameterScope.SHARED:
                message = f"{name} has no effect for one model; put it under the top parameters:"
                yield document.finding(key, message)
            elif is_null(value):
                yield document.finding(key, f"{name} has no value; give one, or remove the line")


def parameter_values(document: Document) -> Findings:
    """Find values that the method refuses, in gradients and lists of filters, too."""
    for known, key, node, is_model in _settings(document):
        if is_model and known.scope == ParameterScope.SHARED:
            continue
        if not isinstance(node, MappingNode) and not _is_list_of_conditions(node):
            yield from _values(document, known, key, node)
            continue
        always = False
        for condition in [node] if isinstance(node, MappingNode) else node.value:
            value = get(condition, "value") if isinstance(condition, MappingNode) else None
            if value is None:
                message = f"{known.name}: a list of filters has entries with value:"
                yield document.finding(condition, message)
                continue
            if always:
                message = f"{known.name}: this is never reached: the entry before it has no filter"
                yield document.finding(condition, message, WARNING)
            filter_node = get(condition, "filter")
            always |= filter_node is None or plain(filter_node) == "*"
            yield from _values(document, known, key, value)
        if not always and known.required:
            message = f"{known.name}: tensors that match no filter have none; add a value alone"
            yield document.finding(key, message, WARNING)


def _values(document: Document, known: ParameterSpec, key: ScalarNode, node: Node) -> Findings:
    if not isinstance(node, SequenceNode):
        if not is_null(node):
            yield from _value(document, known, node)
        return
    if not node.value:
        yield document.finding(key, f"{known.name} is an empty list", WARNING)
    for element in node.value:
        yield from _value(document, known, element)
    values = [plain(element) for element in node.value]
    if _is_whole_number(known) and all(map(_is_whole, values)) and len(set(values)) > 1:
        message = (
            f"{known.name} is a whole number, and a gradient is interpolated between the layers; "
            "give one number"
        )
        yield document.finding(key, message)


def _value(document: Document, known: ParameterSpec, node: Node) -> Findings:
    value = plain(node)
    try:
        converted = known.validate(value)
    except ValueError as error:
        message = str(error).splitlines()[0]
        if "validation error" in message:  # pydantic's, from a method that is not ours
            message = f"{known.name} is {shown(repr(value))}, which is no {_kind(known)}"
        yield document.finding(node, shown(message) if len(message) > 400 else message)
        return
    if known.name == "density" and not 0 <= converted <= 1:
        yield document.finding(node, f"density is {value!r}, but must be from 0 to 1")


def _is_whole_number(known: ParameterSpec) -> bool:
    return known.value_type is int or known.name == "seed"


def missing_parameters(document: Document) -> Findings:
    """Find required parameters that are nowhere."""
    spec = document.spec
    if spec is None:
        return
    for output in document.outputs:
        for known in filter(lambda p: p.required, spec.parameters):
            if known.scope == ParameterScope.SHARED:
                if not any(parameter(scope, known.name) for scope in output.scopes):
                    message = f"{known.name} is missing; put it under parameters:"
                    yield document.finding(output.node, message)
                continue
            for model in output.models:
                skip = known.scope == ParameterScope.NON_BASE and _is_base(model, output)
                if not skip and settings_of(model, output, known.name) is None:
                    yield document.finding(model, f"{known.name} is missing for this model")


def parameters_of_the_base(document: Document) -> Findings:
    """Find parameters of the base model, which have no effect."""
    spec = document.spec
    if spec is None or spec.contract.base == BasePolicy.IGNORED:
        return
    for output in document.outputs:
        for model in output.models:
            node = get(model, "parameters")
            if not _is_base(model, output) or not isinstance(node, MappingNode):
                continue
            ignored = [
                known.name
                for known in spec.parameters
                if known.scope == ParameterScope.NON_BASE and get(node, known.name)
            ]
            if ignored:
                message = "has no effect on the base model, whose delta is zero; remove it"
                yield document.finding(node, f"{', '.join(ignored)} {message}", WARNING)


def normalize(document: Document) -> Findings:
    """Warn of weights that cancel, or are negative, where the sum is divided by theirs."""
    for output in document.outputs:
        node = next((n for s in output.scopes[::-1] if (n := parameter(s, "normalize"))), None)
        default = (
            next((p.default for p in document.spec.parameters if p.name == "normalize"), None)
            if document.spec is not None
            else None
        )
        if (default if node is None else plain(node)) is not True:
            continue
        found = [
            settings_of(model, output, "weight")
            for model in output.models
            if not _is_base(model, output)
        ]
        values = [None if node is None else plain(node) for node in found]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        weights = [float(number) for number in numbers if abs(number) < 1e300]
        if len(weights) < len(values) or not weights:
            continue
        if abs(math.fsum(weights)) < 1e-8:
            message = "the weights cancel, so normalize divides by 1 in place of their sum"
            yield document.finding(output.node, f"{message}; set normalize: false", WARNING)
        elif any(weight < 0 for weight in weights):
            message = "negative weights make normalize divide by less than is added up"
            yield document.finding(output.node, f"{message}; set normalize: false", WARNING)


def densities(document: Document) -> Findings:
    """Warn of configs that drop nothing, or everything."""
    if not _is_ours(document):
        return
    found = [
        settings_of(model, output, "density")
        for output in document.outputs
        for model in output.models
        if not _is_base(model, output)
    ]
    values = [1.0 if node is None else plain(node) for node in found]
    if not any(node is not None for node in found):
        message = "no model has a density, so nothing is dropped; try density: 0.5"
        yield document.finding(document.root, message, WARNING)
    elif all(value == 1 and not isinstance(value, bool) for value in values):
        message = "density is 1 everywhere, so nothing is dropped; try density: 0.5"
        yield document.finding(document.root, message, WARNING)
    elif all(value == 0 and not isinstance(value, bool) for value in values):
        message = "density is 0 everywhere, so all is dropped and the result is the base model"
        yield document.finding(document.root, f"{message}; try density: 0.5", WARNING)


def seed(document: Document) -> Findings:
    """Say that a config without a seed is not the whole recipe."""
    holders = [holder for output in document.outputs for holder in output.scopes + output.models]
    if _is_ours(document) and not any(parameter(h, "seed") for h in [document.root, *holders]):
        message = "no seed is given; with one, the config is the whole recipe: seed: 42"
        yield document.finding(document.root, message, HINT)


def out_dtype(document: Document) -> Findings:
    """Warn where mergekit rounds after the merge method has."""
    dtype, out = (_word(document, key) for key in ("dtype", "out_dtype"))
    node = get(document.root, "out_dtype")
    if node is None or not _is_ours(document) or out == dtype:
        return
    if out == "float16":
        message = (
            "mergekit rounds to float16 after the merge, and numbers above 65504 become infinite "
            "without a word; with dtype: float16 that is an error"
        )
        yield document.finding(node, message, WARNING)


def rounding(document: Document) -> Findings:
    """Warn where stochastic rounding has no effect."""
    nodes = [parameter(scope, "rounding") for o in document.outputs for scope in o.scopes]
    for node in {id(node): node for node in nodes if node is not None}.values():
        if plain(node) != "stochastic" or not _is_ours(document):
            continue
        dtype, out = (_word(document, key) for key in ("dtype", "out_dtype"))
        if out is not None and out != dtype:
            message = f"mergekit rounds to out_dtype: {out} after the merge, to nearest"
            yield document.finding(node, f"{message}; set dtype: {out} in its place", WARNING)
        elif dtype is not None and dtype not in NARROW:
            message = (
                f"stochastic rounding has no effect in {dtype}; it is for bfloat16 and float16"
            )
            yield document.finding(node, message, WARNING)


def epsilon_of_della(document: Document) -> Findings:
    """Find DELLA's densities and epsilons of which no probability is left."""
    if document.spec is None or not document.spec.name.startswith("della"):
        return
    defaults = {p.name: p.default for p in document.spec.parameters}
    for output in document.outputs:
        for model in output.models:
            if _is_base(model, output):
                continue
            nodes = {n: settings_of(model, output, n) for n in ("density", "epsilon")}
            values: list[Any] = [
                defaults.get(n) if node is None else plain(node) for n, node in nodes.items()
            ]
            if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
                continue
            density, epsilon = values
            if 0 < density < 1 and not (density + epsilon < 1 and density - epsilon > 0):
                message = (
                    f"density {density:g} and epsilon {epsilon:g}: density + epsilon must be below "
                    "1, and density - epsilon above 0"
                )
                yield document.finding(nodes["epsilon"] or nodes["density"] or model, message)


def _word(document: Document, key: str) -> str | None:
    node = get(document.root, key)
    value = None if node is None else plain(node)
    return value.removeprefix("torch.") if isinstance(value, str) else None


# In the order in which a reader wants to know.
RULES: tuple[Rule, ...] = (
    method,
    unknown_keys,
    doubled_keys,
    lists_of_models,
    models,
    base_models,
    layer_ranges,
    misplaced_parameters,
    parameter_values,
    missing_parameters,
    parameters_of_the_base,
    normalize,
    densities,
    seed,
    out_dtype,
    rounding,
    epsilon_of_della,
)


def _is_ours(document: Document) -> bool:
    """Tell whether the merge method is one of this package."""
    if document.spec is None or document.spec.name not in OURS:
        return False
    return isinstance(merge_methods.get(document.spec.name), DareMethod)


def _is_base(model: MappingNode, output: Output) -> bool:
    node = get(model, "model")
    return node is not None and output.base is not None and reference(node) == output.base


def _parameter_holders(document: Document) -> Iterator[tuple[MappingNode, bool]]:
    """Yield every mapping that may have ``parameters``, once, and whether it is a model."""
    seen: set[int] = set()
    for output in document.outputs:
        for holder, is_model in (
            *((scope, False) for scope in output.scopes),
            *((model, True) for model in output.models),
        ):
            if id(holder) not in seen:
                seen.add(id(holder))
                yield holder, is_model
    if id(document.root) not in seen:
        yield document.root, False


def _settings(document: Document) -> Iterator[tuple[ParameterSpec, ScalarNode, Node, bool]]:
    """Yield every setting of a parameter that the method knows."""
    if document.spec is None:
        return
    known = {parameter.name: parameter for parameter in document.spec.parameters}
    for holder, is_model in _parameter_holders(document):
        node = get(holder, "parameters")
        for key, value in entries(node) if isinstance(node, MappingNode) else []:
            if str(key.value) in known:
                yield known[str(key.value)], key, value, is_model


def _conditions(document: Document) -> Iterator[MappingNode]:
    for _, _, node, _ in _settings(document):
        if isinstance(node, MappingNode):
            yield node
        elif _is_list_of_conditions(node):
            yield from (item for item in node.value if isinstance(item, MappingNode))


def _is_list_of_conditions(node: Node) -> bool:
    return isinstance(node, SequenceNode) and any(isinstance(e, MappingNode) for e in node.value)


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
            rest += [child for entry in node.value for child in entry]
        elif isinstance(node, SequenceNode):
            rest += node.value


def _kind(known: ParameterSpec) -> str:
    kinds = {float: "number", int: "whole number", bool: "true or false"}
    return kinds.get(known.value_type, str(known.value_type))


def _all_parameter_names() -> set[str]:
    methods = merge_methods.registered_methods()
    return {parameter.name for method in methods for parameter in method.spec.parameters}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``; did you mean KNOWN?`` if one of them is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
