"""Reading the documents of a config file, within limits.

A file's size, its depth, and what its aliases expand to are limited here.
"""

from __future__ import annotations

import codecs
import stat
from collections.abc import Sequence
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node

from mergekit_dare.diagnostics.config.document import Document
from mergekit_dare.diagnostics.config.nodes import children, plain
from mergekit_dare.diagnostics.config.yaml_errors import located
from mergekit_dare.diagnostics.findings import UnusableFileError, cut

LARGEST_FILE = 4 << 20
# Values in a document, counting those behind an alias each time; recipes have a few thousand.
MOST_VALUES = 100_000


def read(path: str) -> list[Document]:
    """Read every document of a config file.

    Raises:
        UnusableFileError: the file cannot be read, is not YAML, or a document is not a mapping.

    """
    return parse(_read_text(path), path)


def parse(text: str, path: str) -> list[Document]:
    """Return the documents of a text; messages name it ``path``.

    Raises:
        UnusableFileError: it is not YAML, or a document is not a mapping.

    """
    lines = text.splitlines()
    try:
        roots = [root for root in yaml.compose_all(text, yaml.SafeLoader) if root is not None]
    except yaml.YAMLError as error:
        line, problem = located(error, lines)
        place = f"{path}:{line}:" if line is not None else path
        raise UnusableFileError(f"{place} cannot be read as YAML: {problem}") from error
    except RecursionError as error:
        raise UnusableFileError(
            f"{path} cannot be read as YAML: it is nested too deeply"
        ) from error
    if not roots:
        raise UnusableFileError(f"{path} is empty")
    documents = []
    for root in roots:
        if not isinstance(root, MappingNode):
            line = root.start_mark.line + 1
            raise UnusableFileError(f"{path}:{line}: a config must be a mapping of keys to values")
        try:
            _bound(root, {}, set())
            plain(root)
        except RecursionError as error:
            raise UnusableFileError(f"{path}: it is nested too deeply") from error
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
    return choose_among(read(path), name)


def choose_among(documents: Sequence[Document], name: str | None) -> Document:
    """Return the only document of a file, or the one of that name; raises as :func:`choose`."""
    found = [document for document in documents if name is None or document.name == name]
    if len(found) == 1:
        return found[0]
    names = ", ".join(document.name or "one without a name" for document in documents)
    what = f"has no config {name}" if not found else f"has {len(found)} configs"
    raise UnusableFileError(f"{documents[0].path} {what}; choose one of these with --name: {names}")


def _read_text(path: str) -> str:
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnusableFileError(f"{path} is not a file")
        if status.st_size > LARGEST_FILE:
            raise UnusableFileError(f"{path} is larger than 4 MiB, too large for a config")
        content = Path(path).read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UnusableFileError(f"{path} is in UTF-16; save it as UTF-8")
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise UnusableFileError(
            f"{path}:{line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: an impossible path
        raise UnusableFileError(f"{cut(path)} cannot be read: {cut(str(error))}") from error


def _bound(node: Node, sizes: dict[int, int], above: set[int]) -> int:
    """Return how many values a node has when its aliases are written out."""
    if id(node) in sizes:
        return sizes[id(node)]
    if id(node) in above:
        raise UnusableFileError(f"line {node.start_mark.line + 1} contains itself")
    size = 1
    above.add(id(node))
    for child in children(node):
        size += _bound(child, sizes, above)
        if size > MOST_VALUES:
            raise UnusableFileError(
                f"it has more than {MOST_VALUES:,} values, too many for a config"
            )
    above.remove(id(node))
    sizes[id(node)] = size
    return size


def _where_it_fails(node: Node) -> Node:
    """Return the innermost node that has no value in Python."""
    for child in children(node):
        try:
            plain(child)
        except Exception:
            return _where_it_fails(child)
    return node
