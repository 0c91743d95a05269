"""Rules on the parameters of the merge method: their names, places and values."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit.config import MergeConfiguration
from mergekit.merge_methods import BasePolicy, ParameterScope
from mergekit.merge_methods.base import ParameterSpec
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mergekit_dare.diagnostics.config.document import Document
from mergekit_dare.diagnostics.config.nodes import entries, get, is_null, parameter, plain
from mergekit_dare.diagnostics.findings import Severity, did_you_mean, shown
from mergekit_dare.diagnostics.rules import Findings, rule

WARNING = Severity.WARNING


@rule
def malformed_parameters(document: Document) -> Findings:
    """Find parameters: that is not a mapping."""
    if document.spec is None:
        return
    for holder, _ in document.parameter_holders():
        node = get(holder, "parameters")
        if node is not None and not isinstance(node, MappingNode):
            message = "parameters must be a mapping of parameter names to values"
            yield document.finding(node, message)


@rule
def unknown_parameter(document: Document) -> Findings:
    """Find a parameter that the merge method does not have and mergekit silently ignores."""
    spec = document.spec
    if spec is None:
        return
    known = {parameter.name for parameter in spec.parameters}
    for holder, _ in document.parameter_holders():
        node = get(holder, "parameters")
        for key, _ in entries(node) if isinstance(node, MappingNode) else []:
            name = str(key.value)
            if name not in known:
                hint = did_you_mean(name, known)
                if name in MergeConfiguration.model_fields:
                    hint = "; it belongs at the top level of the config"
                message = f"{spec.name} has no parameter {shown(name)}{hint}"
                yield document.finding(key, message)


@rule
def shared_parameter_of_a_model(document: Document) -> Findings:
    """Find a parameter of the whole merge that is set for one model, where it has no effect."""
    for known, key, _, is_model in document.settings():
        if is_model and known.scope == ParameterScope.SHARED:
            message = (
                f"{known.name} has no effect on one model; put it under the top-level parameters:"
            )
            yield document.finding(key, message)


def _effective(document: Document) -> Iterator[tuple[ParameterSpec, ScalarNode, Node]]:
    """Yield each setting, except those of shared parameters for one model."""
    for known, key, node, is_model in document.settings():
        if not (is_model and known.scope == ParameterScope.SHARED):
            yield known, key, node


@rule
def parameter_without_a_value(document: Document) -> Findings:
    """Find a parameter with nothing after its colon."""
    for known, key, value in _effective(document):
        if is_null(value):
            message = f"{known.name} has no value; give one, or remove the line"
            yield document.finding(key, message)


@rule
def invalid_parameter_value(document: Document) -> Findings:
    """Find a value that the merge method refuses, also in gradients and lists of filters."""
    for known, key, node in _effective(document):
        if not _is_conditional(node):
            yield from _refused(document, known, key, node)
            continue
        for condition in _conditions(node):
            value = get(condition, "value") if isinstance(condition, MappingNode) else None
            if value is None:
                message = f"{known.name}: each entry in a list of filters needs value:"
                yield document.finding(condition, message)
            else:
                yield from _refused(document, known, key, value)


def _is_conditional(node: Node) -> bool:
    """Tell whether a setting is an entry with a filter, or a list with such entries."""
    if isinstance(node, SequenceNode):
        return any(isinstance(element, MappingNode) for element in node.value)
    return isinstance(node, MappingNode)


def _conditions(node: Node) -> list[Node]:
    return list(node.value) if isinstance(node, SequenceNode) else [node]


def _refused(document: Document, known: ParameterSpec, key: ScalarNode, node: Node) -> Findings:
    if not isinstance(node, SequenceNode):
        if not is_null(node):
            yield from _refused_alone(document, known, node)
        return
    for element in node.value:
        yield from _refused_alone(document, known, element)
    values = [plain(element) for element in node.value]
    is_whole_number = known.value_type is int or known.name == "seed"
    if is_whole_number and all(type(v) is int for v in values) and len(set(values)) > 1:
        message = (
            f"{known.name} is a whole number, but a gradient is interpolated between the layers; "
            "give a single number"
        )
        yield document.finding(key, message)


def _refused_alone(document: Document, known: ParameterSpec, node: Node) -> Findings:
    value = plain(node)
    try:
        converted = known.validate(value)
    except ValueError as error:
        message = str(error).splitlines()[0]
        if "validation error" in message:  # pydantic's, from a method of another package
            message = f"{known.name} is {shown(repr(value))}, but must be {_kind(known)}"
        yield document.finding(node, shown(message) if len(message) > 400 else message)
        return
    if known.name == "density" and not 0 <= converted <= 1:
        yield document.finding(node, f"density is {value!r}, but must be from 0 to 1")


def _kind(known: ParameterSpec) -> str:
    kinds = {float: "a number", int: "a whole number", bool: "true or false"}
    return kinds.get(known.value_type, str(known.value_type))


@rule
def empty_gradient(document: Document) -> Findings:
    """Find a parameter whose value is an empty list."""
    for known, key, node in _effective(document):
        values: list[Node | None] = [node]
        if _is_conditional(node):
            values = [get(c, "value") for c in _conditions(node) if isinstance(c, MappingNode)]
        if any(isinstance(value, SequenceNode) and not value.value for value in values):
            yield document.finding(key, f"{known.name} is an empty list", WARNING)


@rule
def unreachable_filter(document: Document) -> Findings:
    """Find an entry in a list of filters after one that already matches every tensor."""
    for known, _, node in _effective(document):
        conditions = _conditions(node) if _is_conditional(node) else []
        for index, condition in enumerate(conditions):
            has_value = isinstance(condition, MappingNode) and get(condition, "value") is not None
            if has_value and any(map(_matches_every_tensor, conditions[:index])):
                message = f"{known.name}: never reached, as an entry before it matches every tensor"
                yield document.finding(condition, message, WARNING)


def _matches_every_tensor(condition: Node) -> bool:
    if not isinstance(condition, MappingNode) or get(condition, "value") is None:
        return False
    node = get(condition, "filter")
    return node is None or plain(node) == "*"


@rule
def unfiltered_tensors(document: Document) -> Findings:
    """Find a list of filters that leaves some tensors without a required value."""
    for known, key, node in _effective(document):
        if not known.required or not _is_conditional(node):
            continue
        if not any(map(_matches_every_tensor, _conditions(node))):
            message = (
                f"{known.name}: tensors that match no filter have no value; add an entry without a "
                "filter"
            )
            yield document.finding(key, message, WARNING)


@rule
def missing_parameter(document: Document) -> Findings:
    """Find a required parameter that is not set anywhere."""
    spec = document.spec
    if spec is None:
        return
    for inputs in document.input_lists:
        for known in filter(lambda p: p.required, spec.parameters):
            if known.scope == ParameterScope.SHARED:
                if not any(parameter(scope, known.name) for scope in inputs.scopes):
                    message = f"{known.name} is missing; put it under parameters:"
                    yield document.finding(inputs.node, message)
                continue
            without_base = known.scope == ParameterScope.NON_BASE
            for model in inputs.fine_tuned if without_base else inputs.models:
                if inputs.setting(model, known.name) is None:
                    yield document.finding(model, f"{known.name} is missing for this model")


@rule
def parameter_of_the_base_model(document: Document) -> Findings:
    """Find a parameter of fine-tuned models that is set for the base model."""
    spec = document.spec
    if spec is None or spec.contract.base == BasePolicy.IGNORED:
        return
    for inputs in document.input_lists:
        for model in filter(inputs.is_base, inputs.models):
            node = get(model, "parameters")
            if not isinstance(node, MappingNode):
                continue
            ignored = [
                known.name
                for known in spec.parameters
                if known.scope == ParameterScope.NON_BASE and get(node, known.name)
            ]
            if ignored:
                have, them = ("has", "it") if len(ignored) == 1 else ("have", "them")
                message = (
                    f"{', '.join(ignored)} {have} no effect on the base model, whose delta is "
                    f"zero; remove {them}"
                )
                yield document.finding(node, message, WARNING)


RULES = (
    malformed_parameters,
    unknown_parameter,
    shared_parameter_of_a_model,
    parameter_without_a_value,
    invalid_parameter_value,
    empty_gradient,
    unreachable_filter,
    unfiltered_tensors,
    missing_parameter,
    parameter_of_the_base_model,
)
