"""What ``mergekit-dare explain`` says around its table, in plain words."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mergekit.common import ModelReference

from mergekit_dare.diagnostics.models import tokenizer
from mergekit_dare.diagnostics.plan import filters, grouping, patterns, tasks
from mergekit_dare.diagnostics.plan.explanation import ExplainedTensor, Explanation

WIDTH = 100
LONG_NAME = 24  # of a model: beyond, only its last part is shown
MOST_TURNS = 5  # of a gradient, before only its range is shown
ROUNDED = 0.02  # how far from 1 the sum of equal shares may be, such as 0.33 of three models


class Labels:
    """What models are called in the text: their names, or the last parts of long ones."""

    def __init__(self, explanation: Explanation) -> None:
        found = [*explanation.models, explanation.base, explanation.donor]
        models = list(dict.fromkeys(model for model in found if model is not None))
        short = {model: _shortened(str(model)) for model in models}
        used = list(short.values())
        self._labels = {
            model: label if used.count(label) == 1 else str(model) for model, label in short.items()
        }

    def __getitem__(self, model: ModelReference) -> str:
        return self._labels.get(model, str(model))

    def legend(self) -> list[str]:
        """Return a line for each model that is not called by its whole name."""
        return [f"{label} is {m}" for m, label in self._labels.items() if label != str(m)]


def _shortened(name: str) -> str:
    """Return the last part of a long path, and that of an adapter's."""
    if len(name) <= LONG_NAME:
        return name
    return "+".join(re.split(r"[/\\]", path.rstrip("/\\"))[-1] for path in name.split("+"))


def value(found: Any) -> str:
    """Return a parameter's value as YAML has it."""
    if found is None:
        return "none"
    if isinstance(found, bool):
        return "true" if found else "false"
    return f"{found:.4g}" if isinstance(found, float) else str(found)


def span(found: Sequence[Any]) -> str:
    """Return a value, or those between which it runs."""
    if all(isinstance(number, float) for number in found):
        if len(found) > MOST_TURNS:
            return f"{value(min(found))} to {value(max(found))}, up and down"
        return " to ".join(map(value, found))
    return " or ".join(map(value, found))


def values(found: Iterable[tuple[str, Sequence[Any]]]) -> str:
    """Return parameters with their values, but those that have none."""
    return ", ".join(f"{name} {span(item)}" for name, item in found if list(item) != [None])


def size(count: int | None) -> str:
    """Return a number of elements, shortened where it is large."""
    if count is None:
        return "?"
    for limit, unit in ((10**9, "B"), (10**6, "M")):
        if count >= limit:
            return f"{count / limit:,.1f} {unit}"
    return f"{count:,}"


def columns(explanation: Explanation) -> list[ModelReference]:
    """Return the models that have a column: those that differ in what is made of them."""
    tensors = explanation.tensors
    with_values = {m for t in tensors for m, values in t.inputs.items() if values}
    models = [m for m in explanation.models if m != explanation.base or m in with_values]
    is_same_everywhere = len({tuple(tensor.inputs) for tensor in tensors}) == 1
    return [] if is_same_everywhere and not with_values else models


def changing_shared(explanation: Explanation) -> list[str]:
    """Return the shared parameters that are not the same for all tensors."""
    names = (known.name for known in explanation.spec.shared_parameters)
    return [name for name in names if len(_shared(explanation, name)) > 1]


def _shared(explanation: Explanation, name: str) -> list[Any]:
    return list(dict.fromkeys(tensor.shared[name] for tensor in explanation.tensors))


def heading(explanation: Explanation, labels: Labels) -> list[str]:
    """Return the method, its models and the parameters that all of them share."""
    method = explanation.plan.config.merge_method
    if not columns(explanation):
        method += f" of {' and '.join(labels[model] for model in explanation.models)}"
    if explanation.base is not None:
        into = " into " if explanation.changes_a_base else ", base model "
        method += into + labels[explanation.base]
    shared = {
        known.name: _shared(explanation, known.name)
        for known in explanation.spec.shared_parameters
        if known.name not in changing_shared(explanation)
        and not (known.name == "int8_mask" and explanation.is_dare)  # has no effect
    }
    parts = [f"{method} ({_dtype(explanation)})", values(shared.items())]
    if shared.get("seed") == [None]:
        parts.append("no seed (that of --random-seed, else 0)")
    return [*_wrapped(", ".join(filter(None, parts))), *labels.legend()]


def _dtype(explanation: Explanation) -> str:
    config = explanation.plan.config
    dtype, out = config.dtype, config.out_dtype
    if dtype is None and out is None:
        found = {tensor.dtype for tensor in explanation.tensors}
        only = found.pop() if len(found) == 1 else None
        return "dtype as stored" if only is None else f"{only}, as stored"
    if out is None or out == dtype:
        return str(dtype).removeprefix("torch.")
    merged = "as stored" if dtype is None else f"in {dtype}"
    return f"merged {merged}, saved in {out}"


def sentences(explanation: Explanation, labels: Labels) -> list[str]:
    """Return what is said below the table, each sentence on its own lines."""
    parts = (
        _layers(explanation, labels),
        _as_in_base(explanation),
        _lacking(explanation, labels),
        _origins(explanation, labels),
        _weights(explanation),
        _gradients(explanation),
        _filters(explanation),
    )
    return [line for part in parts for sentence in part for line in _wrapped(sentence)]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _layers(explanation: Explanation, labels: Labels) -> Iterator[str]:
    runs = grouping.layer_runs(explanation.tensors)
    prefixes = {run.prefix for run in runs}
    for run in runs:
        where = f" of {run.prefix}" if len(prefixes) > 1 else ""
        sources = " and ".join(
            f"{_layer_range(first, first + run.last - run.first)} of {labels[model]}"
            for model, first in run.sources
        )
        yield f"L{_layer_range(run.first, run.last)[1:]}{where}: from {sources}"


def _layer_range(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def _names(tensors: Iterable[ExplainedTensor], explanation: Explanation) -> str:
    names = [tensor.name for tensor in tensors]
    found = patterns.fold(names, [tensor.name for tensor in explanation.tensors])
    more = f", and {len(found) - 3} more kinds" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more


def _as_in_base(explanation: Explanation) -> Iterator[str]:
    staying = [tensor for tensor in explanation.tensors if tensor.stays]
    if len(staying) == len(explanation.tensors):
        yield "Everything is as in the base model: nothing is added to it."
    elif staying:
        count = size(grouping.total(staying))
        yield f"As in the base model: {count} parameters ({_names(staying, explanation)})"


def _lacking(explanation: Explanation, labels: Labels) -> Iterator[str]:
    for model in dict.fromkeys(m for tensor in explanation.tensors for m in tensor.lacking):
        tensors = [tensor for tensor in explanation.tensors if model in tensor.lacking]
        yield f"Not in {labels[model]}, and merged without it: {_names(tensors, explanation)}"


def tokenizer_source(explanation: Explanation) -> str | None:
    """Return what the config says of the tokenizer."""
    source = tokenizer.source_of(explanation.plan.config)
    return None if source is None else str(source)


def _origins(explanation: Explanation, labels: Labels) -> Iterator[str]:
    if explanation.plan.is_of_single_files:
        yield "mergekit-pytorch writes the tensors alone: no config.json, no tokenizer."
        return
    donor = explanation.donor
    giver = "the model that mergekit meets first, in each run perhaps another (set base_model)"
    if donor is not None:
        giver = labels[donor]
    source, template = tokenizer_source(explanation), explanation.plan.config.chat_template
    copied = ["config.json"]
    if source is None:
        copied.append("tokenizer")
    if template is None and source is None:
        copied.append("chat template")
    yield f"From {giver}: {', '.join(copied)}"
    if source is not None:
        names = {"union": "the tokens of all models", "base": f"that of {giver}"}
        aligned = any(tasks.aligns_tokens(tensor.task) for tensor in explanation.plan.tensors)
        rows = ", whose order the rows of the embeddings take" if aligned else ""
        more = "" if template is not None else "; the chat template comes with it"
        yield f"Tokenizer: {names.get(source, f'that of {source}')}{rows}{more}"
    if template is not None:
        own = "the config's own" if "{" in template else f"mergekit's {template}"
        yield f"Chat template: {'the one that most models have' if template == 'auto' else own}"


def _weights(explanation: Explanation) -> Iterator[str]:
    """Say what the sum of weights means, of the methods of this package."""
    tensors = [t for t in explanation.tensors if t.weight_sum is not None]
    if not explanation.is_dare or not tensors:
        return
    for normalize in (False, True):
        those = [t for t in tensors if bool(t.shared["normalize"]) is normalize]
        if those:
            yield _of_sums(those, normalize)
    if any(weight < 0 for weight in _weights_of(tensors)):
        yield "A negative weight takes a change away."
    if any(not tensor.shared["rescale"] for tensor in tensors):
        yield "rescale is false: what is dropped of a change is not made up for."
    if any(tensor.shared["lambda"] != 1 for tensor in tensors):
        yield "In the end, lambda multiplies the merged change."


def _weights_of(tensors: Iterable[ExplainedTensor]) -> list[float]:
    return [t.inputs[model]["weight"] for t in tensors for model in t.fine_tuned]


def _of_sums(tensors: list[ExplainedTensor], normalize: bool) -> str:
    sums = [tensor.weight_sum for tensor in tensors if tensor.weight_sum is not None]
    least, greatest = min(sums), max(sums)
    shown = value(least)
    if not math.isclose(least, greatest):
        shown += f" to {value(greatest)}"
    if max(len(tensor.fine_tuned) for tensor in tensors) == 1:
        return _of_one_weight(shown, sums, normalize)
    if normalize:
        return (
            f"The weights add up to {shown}, and normalize divides by their sum, in dare_ties by "
            "that of the elected sign: an average of the changes."
        )
    meanings = []
    if any(total < 1 - ROUNDED for total in sums):
        meanings.append("below 1, each change enters in part")
    averages = [total for total in sums if abs(total - 1) <= ROUNDED]
    if averages:
        at = "at" if all(math.isclose(total, 1) for total in averages) else "at about"
        meanings.append(f"{at} 1, that is an average of the changes")
    if any(total > 1 + ROUNDED for total in sums):
        whole = " (of weights of 1 each, the whole of each change)"
        is_whole = all(weight == 1 for weight in _weights_of(tensors))
        more = "the whole of each change" if is_whole else f"more than an average: a sum{whole}"
        meanings.append(f"above 1, that is {more}")
    return f"The weights add up to {shown}: {'; '.join(meanings)}."


def _of_one_weight(shown: str, sums: list[float], normalize: bool) -> str:
    if normalize:
        return "With one model, normalize makes any weight but 0 a 1: the whole of its change."
    if all(weight == 1 for weight in sums):
        return "At weight 1, the whole of the change enters."
    return f"Of the one model's change, {shown} times the whole enters."


def _gradients(explanation: Explanation) -> Iterator[str]:
    groups = grouping.group(explanation.tensors)
    if any(len({grouping.values_of(t) for t in group.tensors}) > 1 for group in groups):
        yield (
            "Ranges run over the layers of a slice; tensors outside of the layers take a "
            "gradient's first value."
        )


def _filters(explanation: Explanation) -> Iterator[str]:
    for finding in filters.unmatched_filter(explanation.plan):
        yield f"Line {finding.line}: {finding.message}"
