"""Tensors of a merge in groups: those of equal values, and those whose values run over layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mergekit.common import ModelReference

from mergekit_dare.diagnostics.plan.explanation import ExplainedTensor

# Layers with no more different values than this, each of several layers, are as many groups.
MOST_STEPS = 3
Key = TypeVar("Key", bound=Hashable)


@dataclass
class Group:
    """Tensors that are made in one way, or in one that changes from layer to layer.

    Attributes:
        tensors: In the order of the plan.

    """

    tensors: list[ExplainedTensor]

    @property
    def names(self) -> list[str]:
        """The tensors' names."""
        return [tensor.name for tensor in self.tensors]

    @property
    def size(self) -> int | None:
        """How many elements the tensors have, if their shapes are known."""
        return total(self.tensors)

    @property
    def models(self) -> list[ModelReference]:
        """The models that the tensors are made of."""
        return list(dict.fromkeys(model for tensor in self.tensors for model in tensor.inputs))

    def of_model(self, model: ModelReference, parameter: str) -> list[Any]:
        """Return a model's parameter, one value or those between which it runs over the layers."""
        values = [t.inputs[model][parameter] for t in self._by_layer if model in t.inputs]
        return turning_points(values)

    def shared(self, parameter: str) -> list[Any]:
        """Return a shared parameter, one value or those between which it runs over the layers."""
        return turning_points([tensor.shared[parameter] for tensor in self._by_layer])

    @property
    def weight_sums(self) -> list[float]:
        """The sums of the fine-tuned models' weights, one or those between which they run."""
        sums = [tensor.weight_sum for tensor in self._by_layer]
        return turning_points([found for found in sums if found is not None])

    @property
    def _by_layer(self) -> list[ExplainedTensor]:
        """One tensor of each layer, or any one if the values are the same everywhere."""
        if len({values_of(tensor) for tensor in self.tensors}) == 1:
            return self.tensors[:1]
        layers = {layer_of(tensor.name)[1]: tensor for tensor in self.tensors}
        return [layers[layer] for layer in sorted(layers)]


def total(tensors: Iterable[ExplainedTensor]) -> int | None:
    """Return how many elements tensors have together, if all shapes are known."""
    sizes = [tensor.size for tensor in tensors]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


@dataclass(frozen=True)
class LayerRun:
    """Layers of the merged model that follow each other, as they do in what they are made of.

    Attributes:
        prefix: What comes before the number in the tensors' names.
        first: The first layer's number.
        last: The last layer's number.
        sources: Models, with the number of the layer that becomes the first.

    """

    prefix: str
    first: int
    last: int
    sources: tuple[tuple[ModelReference, int], ...]


def layer_runs(tensors: Iterable[ExplainedTensor]) -> list[LayerRun]:
    """Return which layer becomes which; nothing of layers that all keep their places."""
    found: dict[str, dict[int, dict[ModelReference, int]]] = {}
    for tensor in tensors:
        kind, layer = layer_of(tensor.name)
        if layer < 0:
            continue
        layers = found.setdefault(kind.split("#")[0].strip("."), {})
        for model, name in tensor.input_names.items():
            layers.setdefault(layer, {}).setdefault(model, layer_of(name)[1])
    runs: list[LayerRun] = []
    for prefix, layers in found.items():
        models = {tuple(sources) for sources in layers.values()}
        keeps = all(n == layer for layer, s in layers.items() for n in s.values())
        if not (keeps and len(models) == 1):
            runs += _runs(prefix, layers)
    return runs


def _runs(prefix: str, layers: dict[int, dict[ModelReference, int]]) -> Iterator[LayerRun]:
    run: LayerRun | None = None
    for layer in sorted(layers):
        sources = tuple(layers[layer].items())
        if run is not None and layer == run.last + 1:
            expected = tuple((model, first + layer - run.first) for model, first in run.sources)
            if sources == expected:
                run = replace(run, last=layer)
                continue
        if run is not None:
            yield run
        run = LayerRun(prefix, layer, layer, sources)
    if run is not None:
        yield run


def turning_points(values: Sequence[Any]) -> list[Any]:
    """Return where a sequence of numbers begins, turns and ends; of all else each value once."""
    if not all(isinstance(value, float | int) and type(value) is not bool for value in values):
        return list(dict.fromkeys(values))
    found: list[Any] = []
    for value in values:
        if found and found[-1] == value:
            continue
        if len(found) > 1 and (found[-1] - found[-2]) * (value - found[-1]) > 0:
            found[-1] = value
        else:
            found.append(value)
    return found


def layer_of(name: str) -> tuple[str, int]:
    """Return a name without the number of its layer, and that: the first number in it, or -1."""
    parts = name.split(".")
    index = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    if index is None:
        return name, -1
    return ".".join([*parts[:index], "#", *parts[index + 1 :]]), int(parts[index])


def group(tensors: Iterable[ExplainedTensor]) -> list[Group]:
    """Return tensors in groups, in the order of their first ones.

    Tensors of equal values are one group. Where values change from layer to layer, as a gradient
    lets them, the layers of a slice are one group, and all tensors whose values change in the same
    way with them.
    """
    ordered = list(tensors)
    equal: dict[Hashable, list[ExplainedTensor]] = {}
    changing: list[list[ExplainedTensor]] = []
    for kind in _split(ordered, lambda tensor: layer_of(tensor.name)[0]):
        for part in _split(kind, _structure):
            if _is_in_steps(part):
                runs = _split(part, values_of)
            else:
                runs = _split(part, lambda tensor: tensor.slice)
            for run in runs:
                if len(_split(run, values_of)) == 1:
                    equal.setdefault(values_of(run[0]), []).extend(run)
                else:
                    changing.append(run)
    order = {tensor.name: number for number, tensor in enumerate(ordered)}
    groups = [
        Group(sorted(found, key=lambda tensor: order[tensor.name]))
        for found in (*equal.values(), *_joined(changing))
    ]
    return sorted(groups, key=lambda found: order[found.tensors[0].name])


def _split(
    tensors: Iterable[ExplainedTensor], key: Callable[[ExplainedTensor], Key]
) -> list[list[ExplainedTensor]]:
    found: dict[Key, list[ExplainedTensor]] = {}
    for tensor in tensors:
        found.setdefault(key(tensor), []).append(tensor)
    return list(found.values())


def _is_in_steps(tensors: list[ExplainedTensor]) -> bool:
    steps = len(_split(tensors, values_of))
    return steps <= MOST_STEPS and 2 * steps <= len(tensors)


def _joined(changing: list[list[ExplainedTensor]]) -> list[list[ExplainedTensor]]:
    """Join tensors of a slice whose values are the same in the layers that they share."""
    found: list[tuple[dict[int, Hashable], list[ExplainedTensor]]] = []
    for run in sorted(changing, key=len, reverse=True):
        values: dict[int, Hashable] = {layer_of(t.name)[1]: (t.slice, values_of(t)) for t in run}
        for known, tensors in found:
            shared = values.keys() & known.keys()
            if shared and all(values[layer] == known[layer] for layer in shared):
                known |= values
                tensors += run
                break
        else:
            found.append((values, list(run)))
    return [tensors for _, tensors in found]


def values_of(tensor: ExplainedTensor) -> Hashable:
    """Return all that decides how a tensor is made, to be compared."""
    models = tuple((model, *sorted(values.items())) for model, values in tensor.inputs.items())
    return tensor.base_model, models, tuple(sorted(tensor.shared.items())), tensor.dtype


def _structure(tensor: ExplainedTensor) -> Hashable:
    """Return what does not change within a group: the models, and values that are no numbers."""
    models = tuple((model, *_words(values.items())) for model, values in tensor.inputs.items())
    return tensor.base_model, models, _words(tensor.shared.items()), tensor.dtype


def _words(values: Iterable[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, value) for name, value in values if not isinstance(value, float))
