"""A config as a document with lines: which models go into which output, and what may stand where.

Read with PyYAML's nodes, which know their lines. What a document may cost is bounded here, once:
its size, its depth, and what aliases expand it to.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.merge_methods import MergeMethodSpec
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mergekit_dare.diagnostics.findings import (
    Finding,
    Severity,
    UnusableFileError,
    cut,
    without_middle,
)

LARGEST_FILE = 4 << 20
# Values in a document, those behind an alias counted each time; recipes have a few thousand.
MOST_VALUES = 100_000

Entry = tuple[ScalarNode, Node]


@dataclass(frozen=True)
class Output:
    """Models that are merged with each other, and where their parameters may stand.

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
        """The listed models, without those that are no reference to one."""
        nodes = [get(model, "model") for model in self.models]
        found = [None if node is None else reference(node) for node in nodes]
        return [model for model in found if model is not None]

    @property
    def fine_tuned(self) -> set[ModelReference]:
        """The listed models but the base."""
        return {model for model in self.references if model != self.base}


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

    @cached_property
    def spec(self) -> MergeMethodSpec | None:
        """What its merge method declares, if mergekit knows it."""
        node = get(self.root, "merge_method")
        name = None if node is None else plain(node)
        methods = {method.spec.name: method.spec for method in merge_methods.registered_methods()}
        return methods.get(name) if isinstance(name, str) else None

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
    def outputs(self) -> list[Output]:
        """Every list of models that are merged with each other."""
        found = list(self._outputs_of(self.root, [self.root], "config"))
        for name, module in self.modules.items():
            found += self._outputs_of(module, [self.root, module], name)
        return found

    def _outputs_of(
        self, holder: MappingNode, scopes: list[MappingNode], name: str
    ) -> Iterator[Output]:
        base_node = get(self.root, "base_model")
        models = get(holder, "models")
        if isinstance(models, SequenceNode):
            yield Output(name, models, mappings(models), scopes, base_node, is_slice=False)
        for index, part in enumerate(slices(holder)):
            sources = get(part, "sources")
            if isinstance(sources, SequenceNode):
                yield Output(
                    f"{name}.slices[{index}]",
                    sources,
                    mappings(sources),
                    [*scopes, part],
                    get(part, "base_model") or base_node,
                    is_slice=True,
                )

    def finding(self, node: Node, message: str, severity: Severity = Severity.ERROR) -> Finding:
        """Make a finding that points at a node's first line."""
        line = node.start_mark.line
        text = without_middle(self.lines[line].strip()) if line < len(self.lines) else ""
        return Finding(severity, self.path, line + 1, text, message)


def read(path: str) -> list[Document]:
    """Read every document of a config file.

    Raises:
        UnusableFileError: the file cannot be read, is not YAML, or a document is no mapping.

    """
    return parse(_read_text(path), path)


def parse(text: str, path: str) -> list[Document]:
    """Make documents of a text; ``path`` is what messages name.

    Raises:
        UnusableFileError: it is not YAML, or a document is no mapping.

    """
    lines = text.splitlines()
    try:
        roots = [root for root in yaml.compose_all(text, yaml.SafeLoader) if root is not None]
    except yaml.YAMLError as error:
        raise UnusableFileError(f"{path} cannot be read as YAML: {cut(str(error))}") from error
    except RecursionError as error:
        raise UnusableFileError(f"{path} cannot be read as YAML: it is nested too deep") from error
    if not roots:
        raise UnusableFileError(f"{path} is empty")
    documents = []
    for root in roots:
        if not isinstance(root, MappingNode):
            line = root.start_mark.line + 1
            raise UnusableFileError(f"{path}:{line}: a config is a mapping of keys to values")
        try:
            _bound(root, {}, set())
            plain(root)
        except RecursionError as error:
            raise UnusableFileError(f"{path}: it is nested too deep") from error
        except UnusableFileError as error:
            raise UnusableFileError(f"{path}: {error}") from error
        except Exception as error:  # PyYAML's constructors raise whatever Python's types do
            where = _where_it_fails(root)
            raise UnusableFileError(
                f"{path}:{where.start_mark.line + 1}: cannot be read as YAML: {cut(str(error))}"
            ) from error
        documents.append(Document(path, lines, root))
    return documents


def choose(path: str, name: str | None) -> Document:
    """Read a file and return its only config, or the one of that name.

    Raises:
        UnusableFileError: as :func:`read`, or there is no such config, or more than one.

    """
    documents = read(path)
    found = [document for document in documents if name is None or document.name == name]
    if len(found) == 1:
        return found[0]
    names = ", ".join(document.name or "one without a name" for document in documents)
    what = f"has no config {name}" if not found else f"has {len(found)} configs"
    raise UnusableFileError(f"{path} {what}: choose one with --name; there are: {names}")


def _read_text(path: str) -> str:
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnusableFileError(f"{path} is no file")
        if status.st_size > LARGEST_FILE:
            raise UnusableFileError(f"{path} is larger than 4 MiB: no config is")
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a path that no file has
        raise UnusableFileError(f"{cut(path)} cannot be read: {cut(str(error))}") from error


def _bound(node: Node, sizes: dict[int, int], above: set[int]) -> int:
    """Return how many values a node has when its aliases are written out."""
    if id(node) in sizes:
        return sizes[id(node)]
    if id(node) in above:
        raise UnusableFileError(f"line {node.start_mark.line + 1} contains itself")
    size = 1
    above.add(id(node))
    for child in _children(node):
        size += _bound(child, sizes, above)
        if size > MOST_VALUES:
            raise UnusableFileError(f"it has more than {MOST_VALUES:,} values: no config has")
    above.remove(id(node))
    sizes[id(node)] = size
    return size


def _children(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [child for entry in node.value for child in entry]
    return list(node.value) if isinstance(node, SequenceNode) else []


def _where_it_fails(node: Node) -> Node:
    """Return the innermost node that cannot be made a Python value."""
    for child in _children(node):
        try:
            plain(child)
        except Exception:
            return _where_it_fails(child)
    return node


def plain(node: Node) -> Any:
    """Return a node as Python values; resolves YAML's merge keys in place."""
    return yaml.SafeLoader("").construct_document(node)


def reference(node: Node) -> ModelReference | None:
    """Return the model that a node refers to, by mergekit's own rules; ``None`` if it is none."""
    try:
        return ModelReference.model_validate(plain(node))
    except Exception:  # mergekit raises RuntimeError beside pydantic's errors
        return None


def entries(mapping: MappingNode) -> list[Entry]:
    """Return the keys and values whose keys are scalars."""
    return [(key, value) for key, value in mapping.value if isinstance(key, ScalarNode)]


def get(mapping: MappingNode, name: str) -> Node | None:
    """Return a key's value, the last one as YAML takes it; ``None`` if it is null or absent."""
    found: list[Node] = [value for key, value in entries(mapping) if key.value == name]
    return found[-1] if found and not is_null(found[-1]) else None


def is_null(node: Node) -> bool:
    """Tell whether a node has no value."""
    return bool(node.tag == "tag:yaml.org,2002:null")


def mappings(sequence: SequenceNode) -> list[MappingNode]:
    """Return the entries that are mappings."""
    return [node for node in sequence.value if isinstance(node, MappingNode)]


def slices(holder: MappingNode) -> list[MappingNode]:
    """Return the entries of ``slices``."""
    found = get(holder, "slices")
    return mappings(found) if isinstance(found, SequenceNode) else []


def parameter(holder: MappingNode, name: str) -> Node | None:
    """Return the setting of a parameter in one place."""
    parameters = get(holder, "parameters")
    return get(parameters, name) if isinstance(parameters, MappingNode) else None


def settings_of(model: MappingNode, output: Output, name: str) -> Node | None:
    """Return the setting of a parameter that counts for a model, as mergekit looks for it."""
    scopes = [model, *output.scopes[::-1]]
    return next((found for scope in scopes if (found := parameter(scope, name))), None)
