"""YAML's nodes, which know their lines: what is under a key, and its value in Python."""

from __future__ import annotations

from typing import Any

import yaml
from mergekit.common import ModelReference
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

Entry = tuple[ScalarNode, Node]


def plain(node: Node) -> Any:
    """Return a node as Python values; resolves YAML's merge keys in place."""
    return yaml.SafeLoader("").construct_document(node)


def reference(node: Node) -> ModelReference | None:
    """Return the model that a node refers to, as mergekit parses it; ``None`` if it cannot."""
    try:
        return ModelReference.model_validate(plain(node))
    except Exception:  # mergekit raises RuntimeError, too, not only pydantic's errors
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


def children(node: Node) -> list[Node]:
    """Return what a node consists of: the entries of a list, the keys and values of a mapping."""
    if isinstance(node, MappingNode):
        return [child for entry in node.value for child in entry]
    return list(node.value) if isinstance(node, SequenceNode) else []
