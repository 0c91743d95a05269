"""A rule on the filters of parameters: which tensors they take, by mergekit's own matching."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from mergekit.config import ConditionalParameter, evaluate_setting
from mergekit.merge_methods.base import ParameterScope
from pydantic import TypeAdapter, ValidationError
from yaml.nodes import MappingNode, Node, SequenceNode

from mergekit_dare.diagnostics.config.nodes import get, parameter, plain, reference
from mergekit_dare.diagnostics.findings import Severity, did_you_mean, shown
from mergekit_dare.diagnostics.plan import patterns, tasks
from mergekit_dare.diagnostics.plan.merge_plan import MergePlan
from mergekit_dare.diagnostics.rules import Findings, rule

_CONDITIONS = TypeAdapter(list[ConditionalParameter])


@rule
def unmatched_filter(plan: MergePlan) -> Findings:
    """Find a filter that takes no tensor: none has it in its name, or entries before it take all.

    A filter in a slice is compared with the tensors of all slices.
    """
    if plan.document.spec is None or not _is_known(plan):
        return
    for name, node, tensors in _filtered_settings(plan):
        nodes = node.value if isinstance(node, SequenceNode) else [node]
        try:
            conditions = _CONDITIONS.validate_python([plain(entry) for entry in nodes])
        except ValidationError:  # no list of filters; what else it may be, other rules say
            continue
        taken = {_taken_by(tensor, conditions) for tensor in tensors}
        for index, condition in enumerate(conditions):
            found = shown(str(condition.filter))
            if index in taken or not tensors or any(map(_takes_all, conditions[: index + 1])):
                continue
            if any(_taken_by(tensor, [condition]) is not None for tensor in tensors):
                message = f"every tensor with {found} in its name is taken by an entry before this"
                message += " one; put it before that"
            else:
                message = (
                    f"no tensor has {found} in its name{_hint(str(condition.filter), tensors)}"
                )
            yield plan.document.finding(nodes[index], f"{name}: {message}", Severity.WARNING)


def _is_known(plan: MergePlan) -> bool:
    """Tell whether there is a plan; the names in pickled single files are not looked at."""
    if plan.is_of_single_files and not all(plan.models[m].files.tensors for m in plan.nodes):
        return False
    try:
        return bool(plan.tensors)
    except Exception:  # said by other rules, or by mergekit
        return False


def _filtered_settings(plan: MergePlan) -> Iterator[tuple[str, Node, list[str]]]:
    """Yield parameters that are filtered in one place, and the tensors that they are looked for.

    Shared parameters go by the names of the output; those of a model by its own, which are others
    where slices move layers.
    """
    assert plan.document.spec is not None
    for holder, is_model in plan.document.parameter_holders():
        for known in plan.document.spec.parameters:
            node = parameter(holder, known.name)
            if not isinstance(node, MappingNode | SequenceNode):
                continue
            if known.scope != ParameterScope.SHARED:
                model = get(holder, "model") if is_model else None
                yield known.name, node, _input_names(plan, known.name, model)
            elif not is_model:
                yield known.name, node, [save.tensor_name for save in plan.saves]


def _input_names(plan: MergePlan, parameter_name: str, node: Node | None) -> list[str]:
    """Return the names of the tensors that have a parameter, of one model or of all of them."""
    wanted = None if node is None else reference(node)
    found = {
        weight.name: None
        for tensor in plan.tensors
        for model, weight in tasks.input_weights(tensor.task).items()
        if (wanted is None or model == wanted)
        and parameter_name in dict(tensor.task.input_parameters[model].items())
    }
    return list(found)


def _taken_by(tensor: str, conditions: Sequence[ConditionalParameter]) -> int | None:
    """Return the number of the entry that mergekit takes for a tensor; ``None`` if none fits."""
    numbered = [
        ConditionalParameter(value=number, filter=condition.filter)
        for number, condition in enumerate(conditions)
    ]
    found: int | None = evaluate_setting(tensor, numbered, validate=lambda value: value)
    return found


def _takes_all(condition: ConditionalParameter) -> bool:
    return _taken_by("", [condition]) is not None


def _hint(found: str, tensors: Iterable[str]) -> str:
    """Say what may have been meant by a filter that no tensor's name contains."""
    names = list(tensors)
    literals = sorted(re.split(r"[^\w.-]+|\.(?=\W|$)", found), key=len, reverse=True)
    literal = literals[0].strip(".")
    if literal and literal != found and any(literal in name for name in names):
        return f"; a filter is a part of a name, without wildcards: {literal} is one"
    unnumbered = _unnumbered(found)
    if unnumbered != found and any(unnumbered in _unnumbered(name) for name in names):
        layers = patterns.numbers(int(n) for name in names for n in re.findall(r"\d+", name)[:1])
        return f"; the layers are {layers}"
    length = found.strip(".").count(".") + 1
    pieces = {
        ".".join(parts[index : index + length])
        for parts in (name.split(".") for name in names)
        for index in range(len(parts) - length + 1)
    }
    near = did_you_mean(found.strip(".").lower(), sorted(pieces))
    return near or "; mergekit-dare explain --tensors '*' lists the names"


def _unnumbered(text: str) -> str:
    return re.sub(r"\d+", "0", text)
