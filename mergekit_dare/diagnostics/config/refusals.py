"""Rules that let mergekit itself judge a config, and report what it says at the lines it means.

Its validators and its parsers of dtypes, templates and dependencies are run; none of their rules
are repeated here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import mergekit.merge
from mergekit import merge_methods
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.scripts import multimerge
from pydantic import ValidationError
from yaml.nodes import MappingNode, Node, SequenceNode

from mergekit_dare.diagnostics.config import chat_template
from mergekit_dare.diagnostics.config.document import Document
from mergekit_dare.diagnostics.config.nodes import entries, get, plain
from mergekit_dare.diagnostics.findings import cut, reason
from mergekit_dare.diagnostics.rules import Findings, rule
from mergekit_dare.plugin.methods import DareMethod


@rule
def refused_config(document: Document) -> Findings:
    """Find what mergekit's own validators of configs refuse."""
    try:
        document.configuration()
    except ValidationError as error:
        yield from _at_their_lines(document, error)
    except Exception as error:  # some of its validators raise RuntimeError
        yield document.finding(_named_in(str(error), document), _refusal(error))


def _named_in(message: str, document: Document) -> Node:
    """Return the first key of the config that a message names, or the config."""
    words = set(re.findall(r"\w+", message))
    keys = (key for key, _ in entries(document.root) if key.value in words)
    return next(keys, document.root)


def _at_their_lines(document: Document, error: ValidationError) -> Findings:
    """Make one finding for each place: for a union, pydantic reports every member."""
    seen: set[int] = set()
    for details in error.errors(include_url=False, include_context=False):
        node, rest = _walk(document.root, details["loc"])
        if id(node) in seen:
            continue
        seen.add(id(node))
        if details["type"] == "missing":
            yield document.finding(node, f"{details['loc'][-1]} is missing")
        else:
            where = next((str(part) for part in details["loc"][::-1] if isinstance(part, str)), "")
            where = ".".join(map(str, details["loc"][: len(details["loc"]) - len(rest)])) or where
            yield document.finding(node, f"mergekit refuses {where}: {cut(details['msg'])}")


def _walk(node: Node, location: tuple[int | str, ...]) -> tuple[Node, tuple[int | str, ...]]:
    """Follow pydantic's path as far as the document has it; the rest are members of unions."""
    for index, part in enumerate(location):
        child: Node | None = None
        if isinstance(node, MappingNode) and isinstance(part, str):
            child = get(node, part)
        elif isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.value):
            child = node.value[part]
        if child is None:
            return node, location[index:]
        node = child
    return node, ()


@rule
def refused_dtype(document: Document) -> Findings:
    """Find a dtype whose name mergekit does not know."""
    for key in ("dtype", "out_dtype"):
        yield from _try(document, key, dtype_from_name)


@rule
def refused_chat_template(document: Document) -> Findings:
    """Find a chat template that mergekit would refuse only after writing all weights."""

    def attempt(name: str) -> None:
        if name != "auto":
            chat_template.text_of(MergeConfiguration.model_construct(chat_template=name))

    yield from _try(document, "chat_template", attempt)


@rule
def refused_inputs(document: Document) -> Findings:
    """Find a combination of models that the merge method refuses."""
    if document.spec is None:
        return
    method = merge_methods.get(document.spec.name)
    validate = method.validate_inputs
    if isinstance(method, DareMethod):  # it reads the models' files, too, as --files does
        validate = super(DareMethod, method).validate_inputs
    for inputs in document.input_lists:
        models = list(inputs.references)
        if not inputs.is_slice and inputs.base is not None and inputs.base not in models:
            models.append(inputs.base)  # as mergekit does
        try:
            validate(models, inputs.base, group_name=inputs.name)
        except Exception as error:
            yield document.finding(inputs.node, _refusal(error))


@rule
def refused_order(documents: Sequence[Document]) -> Findings:
    """Find merges in one file that mergekit-multi cannot put in order."""
    names = {document.name for document in documents}
    configs: dict[Any, Any] = {}
    uses: dict[Any, Any] = {}
    for document in documents:
        try:
            config = document.configuration()
            configs[document.name], uses[document.name] = multimerge.patched_config(
                config, {name for name in names if name}, "."
            )
        except Exception:
            return  # the other rules report it
    try:
        multimerge.make_tasks(configs, uses, mergekit.merge.MergeOptions(), ".", "out", True)
    except Exception as error:
        yield documents[0].finding(documents[0].root, _refusal(error))


@rule
def repeated_name(documents: Sequence[Document]) -> Findings:
    """Find two merges in a file for mergekit-multi that have the same name, or none."""
    seen: set[str | None] = set()
    for document in documents:
        name = document.name
        if name in seen:
            message = "two merges have no name; only one may go without"
            if name:
                message = f"two merges have the name {name}; give each a name of its own"
            yield document.finding(document.root, message)
        seen.add(name)


def _try(document: Document, key: str, function: Callable[[Any], object]) -> Findings:
    node = get(document.root, key)
    value = None if node is None else plain(node)
    if node is None or not isinstance(value, str):
        return
    try:
        function(value)
    except Exception as error:
        yield document.finding(node, _refusal(error))


def _refusal(error: Exception) -> str:
    return f"mergekit refuses this: {cut(reason(error))}"


RULES = (refused_config, refused_dtype, refused_chat_template, refused_inputs)
