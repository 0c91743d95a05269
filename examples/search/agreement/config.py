"""The configs that weights are searched for: one weight a model, the same for every tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from search import SearchError

Config = dict[str, Any]


class Merge:
    """A config whose weights are searched.

    Attributes:
        base: The base model, as the config names it.
        models: Each fine-tuned model by its name, which is the last part of its path, or the
            whole path if another model's ends alike.

    """

    def __init__(self, config: Config) -> None:
        """Look for what a merge in memory takes.

        Raises:
            SearchError: the config has something else, such as slices or values for each layer.

        """
        self._config = config
        if not any(name == "weight" for name, per_model in _parameters(config) if per_model):
            raise SearchError(f"{config['merge_method']} has no weight for each fine-tuned model")
        self.base = _reference("base_model", config.get("base_model"))
        self._entries = _entries(config)
        paths = [_reference("model", entry.get("model")) for entry in self._entries]
        last = Counter(_last(path) for path in paths)
        self.models = {_last(path) if last[_last(path)] == 1 else path: path for path in paths}
        if len(self.models) < len(paths):
            raise SearchError("the config lists a model twice; each has one weight")
        self._check_values()

    def _check_values(self) -> None:
        shared = self._config.get("parameters") or {}
        for parameters in (shared, *(entry.get("parameters") or {} for entry in self._entries)):
            for name, value in parameters.items():
                if isinstance(value, (list, dict)):
                    message = "is a list; weights are searched with one value for all tensors"
                    raise SearchError(f"{name} {message}, without gradients and filters")

    def with_weights(self, weights: Mapping[str, float]) -> Config:
        """Return the config with the weight of each model in place of what it had."""
        models = []
        for name, entry in zip(self.models, self._entries, strict=True):
            parameters = (entry.get("parameters") or {}) | {"weight": weights[name]}
            models.append(entry | {"parameters": parameters})
        return self._config | {"models": models}


def arguments(config: Config) -> dict[str, Any]:
    """Return the parameters of a config's method as mergekit's functions for Python take them.

    Args:
        config: As :meth:`Merge.with_weights` makes it.

    Returns:
        A shared parameter's value; of one of each model, a mapping from the model's path.

    """
    shared = config.get("parameters") or {}
    found: dict[str, Any] = {}
    for name, per_model in _parameters(config):
        by_model = {
            entry["model"]: (entry.get("parameters") or {})[name]
            for entry in _entries(config)
            if name in (entry.get("parameters") or {})
        }
        if per_model and by_model:
            rest = {entry["model"]: shared[name] for entry in _entries(config) if name in shared}
            found[name] = rest | by_model
        elif name in shared:
            found[name] = shared[name]
    return found


def _parameters(config: Config) -> list[tuple[str, bool]]:
    """Return the parameters of a config's method, and of each whether every model has its own.

    Raises:
        SearchError: there is no such method.

    """
    from mergekit import merge_methods
    from mergekit.merge_methods.base import ParameterScope

    method = str(config.get("merge_method"))
    try:
        spec = merge_methods.get(method).spec
    except Exception as error:
        raise SearchError(f"there is no merge method {method}") from error
    return [(each.name, each.scope == ParameterScope.NON_BASE) for each in spec.parameters]


def _entries(config: Config) -> list[Config]:
    """Return the fine-tuned models' part of a config, without the base model."""
    entries = config.get("models")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        message = "weights are searched for a config with models: a list of them, not slices"
        raise SearchError(message)
    tuned = [entry for entry in entries if entry.get("model") != config.get("base_model")]
    if not tuned:
        raise SearchError("the config has no model beside its base model")
    return tuned


def _reference(key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise SearchError(f"the config needs {key}: a folder or a model of the hub, as a text")
    if "+" in value:
        raise SearchError(f"{value} has an adapter; merge it into its model first")
    return value


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]
