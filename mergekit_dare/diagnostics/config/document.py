"""A config as a document with lines: which models it merges, and where their parameters are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import MergeMethodSpec
from mergekit.merge_methods.base import ParameterSpec
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mergekit_dare.diagnostics.config.nodes import (
    entries,
    get,
    mappings,
    parameter,
    plain,
    reference,
    slices,
)
from mergekit_dare.diagnostics.findings import Finding, Severity, without_middle
from mergekit_dare.plugin.methods import DareMethod
from mergekit_dare.plugin.registration import OURS

# The line of a config that tells how it was merged: its tensors' names are all that was known.
BY_NAME = "# merged by name: mergekit-dare by-name"


@dataclass(frozen=True)
class InputList:
    """Models that are merged with each other, and where their parameters may be set.

    Attributes:
        name: What mergekit calls it in its messages.
        node: What to point at.
        models: The entries of ``models`` or of a slice's ``sources``.
        scopes: What holds shared parameters, the widest first: config, module, slice.
        base_node: Its base model, if there is one.
        is_slice: Whether the entries are sources of a slice.

    """

    name: str
    node: Node
    models: list[MappingNode]
    scopes: list[MappingNode]
    base_node: Node | None
    is_slice: bool

    @property
    def base(self) -> ModelReference | None:
        """The base model."""
        return None if self.base_node is None else reference(self.base_node)

    @cached_property
    def references(self) -> list[ModelReference]:
        """The listed models, without entries that do not refer to one."""
        nodes = [get(model, "model") for model in self.models]
        found = [None if node is None else reference(node) for node in nodes]
        return [model for model in found if model is not None]

    def is_base(self, model: MappingNode) -> bool:
        """Tell whether an entry is the base model."""
        node = get(model, "model")
        return node is not None and self.base is not None and reference(node) == self.base

    @property
    def fine_tuned(self) -> list[MappingNode]:
        """The entries except that of the base model."""
        return [model for model in self.models if not self.is_base(model)]

    def setting(self, model: MappingNode, name: str) -> Node | None:
        """Return the setting of a parameter that applies to a model, as mergekit looks it up."""
        scopes = [model, *self.scopes[::-1]]
        return next((found for scope in scopes if (found := parameter(scope, name))), None)

    def shared_setting(self, name: str) -> Node | None:
        """Return the setting of a shared parameter that applies here."""
        return next((found for s in self.scopes[::-1] if (found := parameter(s, name))), None)


@dataclass
class Document:
    """One config of a file.

    Attributes:
        path: The file's path as it was given.
        lines: The file's lines.
        root: The config.

    """

    path: str
    lines: list[str]
    root: MappingNode = field(repr=False)

    @property
    def name(self) -> str | None:
        """Its name in a file for mergekit-multi."""
        node = get(self.root, "name")
        return None if node is None else str(plain(node))

    @property
    def is_by_name(self) -> bool:
        """Whether it says that its tensors are merged by their names, as ``by-name`` does."""
        return any(line.strip() == BY_NAME for line in self.lines)

    def configuration(self) -> MergeConfiguration:
        """Return the config as mergekit has it.

        Raises:
            Exception: whatever mergekit's validators raise.

        """
        value = plain(self.root)
        value.pop("name", None)
        return MergeConfiguration.model_validate(value)

    @cached_property
    def spec(self) -> MergeMethodSpec | None:
        """What its merge method declares, if mergekit has that method."""
        node = get(self.root, "merge_method")
        name = None if node is None else plain(node)
        methods = {method.spec.name: method.spec for method in merge_methods.registered_methods()}
        return methods.get(name) if isinstance(name, str) else None

    @property
    def has_our_method(self) -> bool:
        """Whether the merge method is one of this package."""
        if self.spec is None or self.spec.name not in OURS:
            return False
        return isinstance(merge_methods.get(self.spec.name), DareMethod)

    @cached_property
    def modules(self) -> dict[str, MappingNode]:
        """The mappings under ``modules``."""
        modules = get(self.root, "modules")
        found = entries(modules) if isinstance(modules, MappingNode) else []
        return {str(key.value): module for key, module in found if isinstance(module, MappingNode)}

    @property
    def holders(self) -> list[MappingNode]:
        """What may hold ``models`` or ``slices``: the config and its modules."""
        return [self.root, *self.modules.values()]

    @cached_property
    def input_lists(self) -> list[InputList]:
        """Every list of models that are merged with each other."""
        found = list(self._input_lists_of(self.root, [self.root], "config"))
        for name, module in self.modules.items():
            found += self._input_lists_of(module, [self.root, module], name)
        return found

    def _input_lists_of(
        self, holder: MappingNode, scopes: list[MappingNode], name: str
    ) -> Iterator[InputList]:
        base_node = get(self.root, "base_model")
        models = get(holder, "models")
        if isinstance(models, SequenceNode):
            yield InputList(name, models, mappings(models), scopes, base_node, is_slice=False)
        for index, part in enumerate(slices(holder)):
            sources = get(part, "sources")
            if isinstance(sources, SequenceNode):
                yield InputList(
                    f"{name}.slices[{index}]",
                    sources,
                    mappings(sources),
                    [*scopes, part],
                    get(part, "base_model") or base_node,
                    is_slice=True,
                )

    @cached_property
    def model_nodes(self) -> dict[ModelReference, Node]:
        """Every model of the config, and where it is first named."""
        found: list[Node | None] = [get(self.root, "base_model")]
        found += [get(part, "base_model") for h in self.holders for part in slices(h)]
        found += [get(model, "model") for inputs in self.input_lists for model in inputs.models]
        nodes: dict[ModelReference, Node] = {}
        for node in found:
            model = None if node is None else reference(node)
            if node is not None and model is not None:
                nodes.setdefault(model, node)
        return nodes

    def parameter_holders(self) -> Iterator[tuple[MappingNode, bool]]:
        """Yield every mapping that may have ``parameters``, once, and whether it is a model."""
        seen: set[int] = set()
        for inputs in self.input_lists:
            for holder, is_model in (
                *((scope, False) for scope in inputs.scopes),
                *((model, True) for model in inputs.models),
            ):
                if id(holder) not in seen:
                    seen.add(id(holder))
                    yield holder, is_model
        if id(self.root) not in seen:
            yield self.root, False

    def settings(self) -> Iterator[tuple[ParameterSpec, ScalarNode, Node, bool]]:
        """Yield each setting of a parameter that the method has, and whether it is a model's."""
        if self.spec is None:
            return
        known = {parameter.name: parameter for parameter in self.spec.parameters}
        for holder, is_model in self.parameter_holders():
            node = get(holder, "parameters")
            for key, value in entries(node) if isinstance(node, MappingNode) else []:
                if str(key.value) in known:
                    yield known[str(key.value)], key, value, is_model

    def word(self, key: str) -> str | None:
        """Return a string at the top level, without ``torch.``; ``None`` if it is not a string."""
        node = get(self.root, key)
        value: Any = None if node is None else plain(node)
        return value.removeprefix("torch.") if isinstance(value, str) else None

    def finding(self, node: Node, message: str, severity: Severity = Severity.ERROR) -> Finding:
        """Make a finding that points at a node's first line."""
        line = node.start_mark.line
        text = without_middle(self.lines[line].strip()) if line < len(self.lines) else ""
        return Finding(severity, self.path, line + 1, text, message)
