"""What ``mergekit-dare explain`` shows of an explanation: as text, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mergekit.common import ModelReference

from mergekit_dare.commands import explain_words as words
from mergekit_dare.commands.explain_words import Labels
from mergekit_dare.diagnostics.plan import filters, grouping, patterns
from mergekit_dare.diagnostics.plan.explanation import ExplainedTensor, Explanation
from mergekit_dare.diagnostics.plan.grouping import Group, LayerRun

MOST_PATTERNS = 4  # of a group, before the rest is counted


def as_json(explanation: Explanation, chosen: list[ExplainedTensor] | None) -> dict[str, Any]:
    """Return everything that is known, as JSON takes it.

    Args:
        explanation: Of a config.
        chosen: The tensors that are listed; ``None`` for all.

    """
    config = explanation.plan.config
    names = [tensor.name for tensor in explanation.tensors]
    return {
        "merge_method": config.merge_method,
        "base_model": _name(explanation.base),
        "dtype": config.dtype,
        "out_dtype": config.out_dtype,
        "tokenizer_source": words.tokenizer_source(explanation),
        "chat_template": config.chat_template,
        "config_from": _name(explanation.donor),
        "models": [str(model) for model in explanation.models],
        "parameters": grouping.total(explanation.tensors),
        "parameters_as_in_base": grouping.total(t for t in explanation.tensors if t.stays),
        "layers": [_run_as_json(run) for run in grouping.layer_runs(explanation.tensors)],
        "groups": [_group_as_json(g, names) for g in grouping.group(explanation.tensors)],
        "tensors": {t.name: _tensor_as_json(t) for t in chosen or explanation.tensors},
        "findings": [f.as_json() for f in filters.unmatched_filter(explanation.plan)],
    }


def _name(model: ModelReference | None) -> str | None:
    return None if model is None else str(model)


def _run_as_json(run: LayerRun) -> dict[str, Any]:
    shift = {str(model): [first, first + run.last - run.first] for model, first in run.sources}
    return {"prefix": run.prefix, "layers": [run.first, run.last], "from": shift}


def _group_as_json(group: Group, names: list[str]) -> dict[str, Any]:
    first = group.tensors[0]
    return {
        "patterns": patterns.fold(group.names, names),
        "tensors": len(group.tensors),
        "parameters": group.size,
        "models": {
            str(model): {name: group.of_model(model, name) for name in values}
            for model, values in first.inputs.items()
        },
        "shared": {name: group.shared(name) for name in first.shared},
        "weight_sum": group.weight_sums,
    }


def _tensor_as_json(tensor: ExplainedTensor) -> dict[str, Any]:
    return {
        "shape": tensor.shape,
        "dtype": tensor.dtype,
        "base_model": _name(tensor.base_model),
        "models": {str(model): dict(values) for model, values in tensor.inputs.items()},
        "from": {str(model): name for model, name in tensor.input_names.items()},
        "shared": dict(tensor.shared),
        "without": [str(model) for model in tensor.lacking],
        "as_in_base": tensor.stays,
    }


def as_text(explanation: Explanation, chosen: list[ExplainedTensor] | None) -> str:
    """Return the explanation for people; arguments as :func:`as_json`."""
    labels = Labels(explanation)
    table = _Table(explanation, labels)
    if chosen is not None:
        groups = [Group([tensor]) for tensor in chosen]
        texts = [[tensor.name] for tensor in chosen]
    else:
        groups = grouping.group(explanation.tensors)
        groups, texts = _labelled(groups, [tensor.name for tensor in explanation.tensors])
    rows = table.lines(groups, texts, one_line_each=chosen is not None)
    lines = [*words.heading(explanation, labels), "", *rows, ""]
    if chosen is None:
        lines += words.sentences(explanation, labels)
    return "\n".join(line.rstrip() for line in lines).rstrip()


def _labelled(groups: list[Group], names: list[str]) -> tuple[list[Group], list[list[str]]]:
    """Return groups with their patterns; the one of the most patterns is last: everything else."""
    if len(groups) == 1:
        return groups, [["all tensors"]]
    folded = [patterns.fold(group.names, names) for group in groups]
    order = list(range(len(groups)))
    most = max(order, key=lambda index: len(folded[index]))
    if len(folded[most]) > 1:
        order.remove(most)
        order.append(most)
        folded[most] = ["everything else"]
    return [groups[index] for index in order], [_few(folded[index]) for index in order]


def _few(found: Sequence[str]) -> list[str]:
    if len(found) <= MOST_PATTERNS:
        return list(found)
    rest = len(found) - MOST_PATTERNS + 1
    return [*found[: MOST_PATTERNS - 1], f"and {rest} more kinds: see --json"]


@dataclass
class _Row:
    """A line of the table: names, how many elements, and a text for each column."""

    names: list[str]
    size: str
    cells: list[str] = field(default_factory=list)


class _Table:
    """Groups as rows, models as columns; below each other where they are too wide."""

    def __init__(self, explanation: Explanation, labels: Labels) -> None:
        self._explanation, self._labels = explanation, labels
        self._spec = explanation.spec
        self._shared = words.changing_shared(explanation)
        self._columns = words.columns(explanation)

    def lines(
        self, groups: list[Group], texts: list[list[str]], *, one_line_each: bool
    ) -> list[str]:
        heads = [self._labels[model] for model in self._columns]
        heads += ["for all models"] if self._shared else []
        rows = [
            _Row(text, words.size(group.size), self._cells(group))
            for group, text in zip(groups, texts, strict=True)
        ]
        if len(rows) > 1:
            tensors = [tensor for group in groups for tensor in group.tensors]
            whole = _Row([f"in all, {len(tensors):,} tensors"], words.size(grouping.total(tensors)))
            rows.append(whole)
        beside = _beside(heads, rows)
        fits = max(map(len, beside)) <= words.WIDTH
        return beside if fits or one_line_each else _below(heads, rows)

    def _cells(self, group: Group) -> list[str]:
        cells = [self._cell(group, model) for model in self._columns]
        if self._shared:
            cells.append(words.values((name, group.shared(name)) for name in self._shared))
        return cells

    def _cell(self, group: Group, model: ModelReference) -> str:
        if model not in group.models:
            return "-"
        parameters = (known.name for known in self._spec.input_parameters)
        has = group.tensors[0].inputs[model]
        text = words.values(
            (name, group.of_model(model, name)) for name in parameters if name in has
        )
        if not text and model == group.tensors[0].base_model:
            return "base model"
        return text or ("as it is" if len(group.models) == 1 else "merged")


def _beside(heads: list[str], rows: list[_Row]) -> list[str]:
    """Return rows with a column for each model."""
    name_width = max(len(name) for row in rows for name in row.names)
    size_width = max(len("parameters"), *(len(row.size) for row in rows))
    columns = [[head, *(row.cells[n] for row in rows if row.cells)] for n, head in enumerate(heads)]
    widths = [max(map(len, column)) for column in columns]

    def line(name: str, size: str = "", cells: Iterable[str] = ()) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=False))
        return "  ".join([name.ljust(name_width), size.rjust(size_width), *padded]).rstrip()

    lines = [line("", "parameters", heads)]
    for row in rows:
        lines.append(line(row.names[0], row.size, row.cells))
        lines += [line(name) for name in row.names[1:]]
    return lines


def _below(heads: list[str], rows: list[_Row]) -> list[str]:
    """Return rows whose models stand below their names."""
    width = max(map(len, heads), default=0)
    lines = []
    for row in rows:
        lines += [*row.names[:-1], f"{row.names[-1]}: {row.size} parameters"]
        cells = zip(heads, row.cells, strict=False)
        shown = [f"    {head.ljust(width)}  {cell}" for head, cell in cells if cell != "-"]
        lines += shown or (["    the base model alone"] if row.cells else [])
    return lines
