"""What is wrong with a mergekit config, found without reading a weight.

mergekit ignores what it does not know, so a misspelt ``density`` merges without dropping
anything, and says so nowhere. This module compares a config with what mergekit's merge methods
declare about their own parameters, at every place where mergekit looks for them.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from mergekit import merge_methods
from mergekit.merge_methods import BasePolicy, MergeMethodSpec, ParameterScope
from mergekit.merge_methods.base import MISSING, ParameterSpec
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from mergekit_dare.diagnostics import model_files
from mergekit_dare.diagnostics.model_files import ModelFiles
from mergekit_dare.plugin.registration import OURS

# What mergekit 0.1.5 reads, by place.
TOP_LEVEL = (
    "base_model",
    "chat_template",
    "dtype",
    "merge_method",
    "models",
    "modules",
    "out_dtype",
    "parameters",
    "slices",
    "tokenizer",
    "tokenizer_source",
)
MODULE = ("models", "parameters", "slices")
SLICE = ("base_model", "parameters", "residual_weight", "sources")
MODEL = ("model", "parameters")
SOURCE = ("layer_range", "model", "parameters")
CONDITION = ("filter", "value")


class UnusableFileError(Exception):
    """The file is no config: it cannot be read, is not YAML, or holds something else."""


class Severity(Enum):
    """How bad it is: the merge fails or is not the one that is written; or may be not; or a tip."""

    ERROR = "error"
    WARNING = "warning"
    HINT = "hint"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        severity: How bad it is.
        file: The config's path as it was given.
        line: Counted from 1.
        text: What stands there.
        message: What is wrong with it, and what to write instead.

    """

    severity: Severity
    file: str
    line: int
    text: str
    message: str

    def __str__(self) -> str:
        """Return ``FILE:LINE: SEVERITY: TEXT: MESSAGE``."""
        return f"{self.file}:{self.line}: {self.severity.value}: {self.text}: {self.message}"

    def as_json(self) -> dict[str, Any]:
        """Return the attributes as JSON takes them."""
        return asdict(self) | {"severity": self.severity.value}


Entry = tuple[ScalarNode, Node]


def check_file(path: str, *, files: bool = False) -> list[Finding]:
    """Check every document of a config file.

    Args:
        path: A YAML file with one config, or several as ``mergekit-multi`` takes them.
        files: Also look at the headers of those models' files that are on this machine.

    Returns:
        The findings in the order of their lines.

    Raises:
        UnusableFileError: the file cannot be read, is not YAML, or a document is no mapping.

    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        documents = [node for node in yaml.compose_all(text, yaml.SafeLoader) if node is not None]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UnusableFileError(f"{path} cannot be read as YAML: {reason}") from error
    if not documents:
        raise UnusableFileError(f"{path} is empty")
    mappings: list[MappingNode] = []
    for document in documents:
        if not isinstance(document, MappingNode):
            line = document.start_mark.line + 1
            raise UnusableFileError(f"{path}:{line}: a config is a mapping of keys to values")
        try:
            _plain(document)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise UnusableFileError(f"{path} cannot be read as YAML: {reason}") from error
        mappings.append(document)
    lines = text.splitlines()
    checks = [_DocumentCheck(path, lines, document) for document in mappings]
    findings = [finding for check in checks for finding in check.run()]
    if len(mappings) > 1:
        findings += checks[0].check_names(mappings)
    if files:
        made_here = {str(_plain(name)) for m in mappings if (name := _get(m, "name")) is not None}
        findings += [finding for check in checks for finding in check.check_files(made_here)]
    return sorted(findings, key=lambda finding: finding.line)


class _DocumentCheck:
    """The checks of one document, which add to ``findings``."""

    def __init__(self, path: str, lines: list[str], document: MappingNode) -> None:
        self.path, self.lines, self.document = path, lines, document
        self.findings: list[Finding] = []
        self.spec: MergeMethodSpec | None = None

    def run(self) -> list[Finding]:
        """Return all findings of this document."""
        self._check_keys(self.document, (*TOP_LEVEL, "name"), "the top level")
        for module in _modules(self.document):
            self._check_keys(module, MODULE, "a module's level")
        for holder in (self.document, *_modules(self.document)):
            for part in _slices(holder):
                self._check_keys(part, SLICE, "a slice's level")
        self._check_method()
        outputs = [key for key in ("models", "slices", "modules") if _get(self.document, key)]
        if len(outputs) != 1:
            there = " and ".join(outputs) or "none"
            self._add(self.document, f"needs one of models, slices, modules; has {there}")
        if self.spec is not None:
            self._check_scope(self.document, [], "parameters")
            for output in _outputs(self.document):
                self._check_output(output)
            self._check_hints()
        return self.findings

    def check_names(self, documents: list[MappingNode]) -> list[Finding]:
        """Return what is wrong between the documents of a file for mergekit-multi."""
        self.findings = []
        seen: set[str | None] = set()
        for document in documents:
            name = _get(document, "name")
            text = None if name is None else str(_plain(name))
            if text in seen:
                what = f"the name {text} is used twice" if text else "two merges have no name"
                self._add(name or document, f"{what}; only one may go without")
            seen.add(text)
        return self.findings

    def check_files(self, made_here: set[str]) -> list[Finding]:
        """Return what is wrong with the models' files.

        Args:
            made_here: Names of this file's own merges, which are no files yet.

        """
        self.findings = []
        keys = ("tokenizer", "tokenizer_source")
        aligns_tokens = any(_get(self.document, key) is not None for key in keys)
        examined: dict[Path, ModelFiles] = {}
        for output in _outputs(self.document):
            base_node = output.base_model or _get(self.document, "base_model")
            nodes = [base_node, *(_get(model, "model") for model in output.models)]
            base = None
            for node in nodes:
                path = None if node is None else _local_path(node, made_here)
                if node is None or path is None:
                    continue
                if path not in examined:
                    examined[path] = model_files.examine(path)
                    for problem in examined[path].problems:
                        self._add(node, problem)
                if node is base_node:
                    base = examined[path]
                elif base is not None and not examined[path].problems:
                    tuned, name = examined[path], str(path)
                    problems = model_files.compare(base, tuned, name, aligns_tokens=aligns_tokens)
                    for problem in problems:
                        self._add(node, problem)
        return self.findings

    def _add(self, node: Node, message: str, severity: Severity = Severity.ERROR) -> None:
        mark = node.start_mark
        text = self.lines[mark.line].strip() if mark.line < len(self.lines) else ""
        self.findings.append(Finding(severity, self.path, mark.line + 1, text, message))

    def _check_keys(self, mapping: MappingNode, known: tuple[str, ...], place: str) -> None:
        self._check_duplicates(mapping)
        parameters = _all_parameter_names()
        for key, _ in _entries(mapping):
            name = str(key.value)
            if name in known:
                continue
            if name in parameters:
                self._add(key, f"{name} has no effect at {place}; put it under parameters:")
            else:
                hint = _did_you_mean(name, known)
                severity = Severity.ERROR if hint else Severity.WARNING
                self._add(key, f"mergekit knows no {name} at {place}{hint}", severity)

    def _check_duplicates(self, mapping: MappingNode) -> None:
        """Find keys that stand twice; one that came in by a merge key may be written anew."""
        seen: set[str] = set()
        for key, _ in _entries(mapping):
            if not mapping.start_mark.index <= key.start_mark.index < mapping.end_mark.index:
                continue
            name = str(key.value)
            if name in seen:
                self._add(key, f"{name} stands here twice; only the last one counts")
            seen.add(name)

    def _check_method(self) -> None:
        node = _get(self.document, "merge_method")
        known = {method.spec.name: method.spec for method in merge_methods.registered_methods()}
        if node is None:
            self._add(self.document, "merge_method is missing")
        elif (name := str(_plain(node))) in known:
            self.spec = known[name]
        else:
            self._add(node, f"mergekit knows no merge method {name}{_did_you_mean(name, known)}")

    def _check_output(self, output: _Output) -> None:
        """Check the models that go into one output: their list, and each one's parameters."""
        assert self.spec is not None
        for scope in output.scopes[1:]:
            self._check_scope(scope, [], "parameters")
        base_node = output.base_model or _get(self.document, "base_model")
        base = None if base_node is None else _model_name(base_node)
        contract = self.spec.contract
        if contract.base == BasePolicy.REQUIRED and base is None:
            message = f"{self.spec.name} needs base_model: the model that all were fine-tuned from"
            self._add(output.node, message)
        seen: set[str] = set()
        for model in output.models:
            name_node = _get(model, "model")
            if name_node is None:
                self._add(model, "model is missing: the model's path or name")
                continue
            name = _model_name(name_node)
            if name in seen:
                self._add(name_node, f"{name} is listed twice; mergekit refuses that")
            seen.add(name)
            self._check_model(model, name == base and contract.base != BasePolicy.IGNORED, output)
        fine_tuned = seen - {base}
        if contract.base == BasePolicy.REQUIRED and not fine_tuned:
            self._add(output.node, "there is no fine-tuned model, so the result is the base model")
        for parameter in self.spec.shared_parameters:
            if parameter.required and self._shared(output, parameter.name) is MISSING:
                self._add(output.node, f"{parameter.name} is missing; put it under parameters:")
        self._check_normalize(output, base)

    def _check_model(self, model: MappingNode, is_base: bool, output: _Output) -> None:
        assert self.spec is not None
        self._check_keys(model, SOURCE if output.is_slice else MODEL, "a model's level")
        node = _get(model, "parameters")
        if is_base and isinstance(node, MappingNode) and node.value:
            ignored = [
                parameter.name
                for parameter in self.spec.parameters
                if parameter.scope == ParameterScope.NON_BASE and _get(node, parameter.name)
            ]
            if ignored:
                message = "has no effect on the base model, whose delta is zero; remove it"
                self._add(node, f"{', '.join(ignored)} {message}", Severity.WARNING)
        self._check_scope(model, ["shared"], "a model's parameters")
        for parameter in self.spec.parameters:
            skip = is_base and parameter.scope == ParameterScope.NON_BASE
            if skip or not parameter.required or parameter.scope == ParameterScope.SHARED:
                continue
            scopes = [model, *output.scopes[::-1]]
            if not any(_parameter(scope, parameter.name) for scope in scopes):
                self._add(model, f"{parameter.name} is missing for this model")

    def _check_scope(self, holder: MappingNode, forbidden: list[str], place: str) -> None:
        """Check the ``parameters`` of a config, a module, a slice or a model."""
        assert self.spec is not None
        node = _get(holder, "parameters")
        if node is None:
            return
        if not isinstance(node, MappingNode):
            self._add(node, "parameters is a mapping of parameter names to values")
            return
        known = {parameter.name: parameter for parameter in self.spec.parameters}
        self._check_duplicates(node)
        for key, value in _entries(node):
            name = str(key.value)
            if name not in known:
                hint = _did_you_mean(name, known)
                self._add(key, f"{self.spec.name} has no parameter {name}{hint}")
            elif known[name].scope.value in forbidden:
                message = f"{name} has no effect for one model; put it under the top parameters:"
                self._add(key, message)
            else:
                self._check_setting(known[name], key, value)

    def _check_setting(self, parameter: ParameterSpec, key: ScalarNode, node: Node) -> None:
        """Check a value, each element of a gradient, and each value of a list of filters."""
        if isinstance(node, SequenceNode) and any(isinstance(e, MappingNode) for e in node.value):
            conditions = node.value
        elif isinstance(node, MappingNode):
            conditions = [node]
        else:
            self._check_values(parameter, key, node)
            return
        always = False
        for condition in conditions:
            if (
                not isinstance(condition, MappingNode)
                or (value := _get(condition, "value")) is None
            ):
                self._add(condition, f"{parameter.name}: a list of filters has entries with value:")
                continue
            self._check_keys(condition, CONDITION, "a filter's entry")
            if always:
                message = "is never reached: the entry before it has no filter"
                self._add(condition, f"{parameter.name}: this {message}", Severity.WARNING)
            filter_node = _get(condition, "filter")
            always |= filter_node is None or _plain(filter_node) == "*"
            self._check_values(parameter, key, value)
        if not always and parameter.required:
            message = f"{parameter.name}: tensors that match no filter have none; add a value alone"
            self._add(key, message, Severity.WARNING)

    def _check_values(self, parameter: ParameterSpec, key: ScalarNode, node: Node) -> None:
        if isinstance(node, SequenceNode):
            if not node.value:
                self._add(key, f"{parameter.name} is an empty list", Severity.WARNING)
            for element in node.value:
                self._check_value(parameter, element)
        elif _plain(node) is not None:
            self._check_value(parameter, node)

    def _check_value(self, parameter: ParameterSpec, node: Node) -> None:
        value = _plain(node)
        try:
            converted = parameter.validate(value)
        except ValueError as error:
            message = str(error).splitlines()[0]
            if "validation error" in message:  # pydantic's, from a method that is not ours
                message = f"{parameter.name} is {value!r}, which is no {_kind(parameter)}"
            self._add(node, message)
            return
        if parameter.name == "density" and not 0 <= converted <= 1:
            self._add(node, f"density is {value!r}, but must be from 0 to 1")

    def _check_normalize(self, output: _Output, base: str | None) -> None:
        """Warn of weights that cancel, or are negative, where the sum is divided by theirs."""
        assert self.spec is not None
        if self._shared(output, "normalize") is not True:
            return
        weights = []
        for model in output.models:
            name = _get(model, "model")
            if name is None or _model_name(name) == base:
                continue
            scopes = [model, *output.scopes[::-1]]
            found = next((p for scope in scopes if (p := _parameter(scope, "weight"))), None)
            value = None if found is None else _plain(found)
            if isinstance(value, bool) or not isinstance(value, int | float):
                return
            weights.append(float(value))
        if weights and abs(math.fsum(weights)) < 1e-8:
            message = "the weights cancel, so normalize divides by 1 in place of their sum"
            self._add(output.node, f"{message}; set normalize: false", Severity.WARNING)
        elif any(weight < 0 for weight in weights):
            message = "negative weights make normalize divide by less than is added up"
            self._add(output.node, f"{message}; set normalize: false", Severity.WARNING)

    def _shared(self, output: _Output, name: str) -> object:
        assert self.spec is not None
        for scope in output.scopes[::-1]:
            if (node := _parameter(scope, name)) is not None:
                return _plain(node)
        return next((p.default for p in self.spec.parameters if p.name == name), None)

    def _check_hints(self) -> None:
        assert self.spec is not None
        if self.spec.name not in OURS:
            return
        holders = [h for output in _outputs(self.document) for h in output.scopes + output.models]
        if not any(_parameter(holder, "density") for holder in holders):
            message = "no model has a density, so nothing is dropped; try density: 0.5"
            self._add(self.document, message, Severity.WARNING)
        if not any(_parameter(holder, "seed") for holder in [self.document, *holders]):
            message = "no seed is given; with one, the config is the whole recipe: seed: 42"
            self._add(self.document, message, Severity.HINT)


@dataclass(frozen=True)
class _Output:
    """Models that are merged with each other, and where their parameters may stand.

    Attributes:
        node: What to point at.
        models: The entries of ``models`` or of a slice's ``sources``.
        scopes: What holds shared parameters, the widest first: config, module, slice.
        base_model: The slice's own base model.
        is_slice: Whether the entries are sources of a slice.

    """

    node: Node
    models: list[MappingNode]
    scopes: list[MappingNode]
    base_model: Node | None
    is_slice: bool


def _outputs(document: MappingNode) -> Iterator[_Output]:
    yield from _outputs_of(document, [document])
    for module in _modules(document):
        yield from _outputs_of(module, [document, module])


def _modules(document: MappingNode) -> list[MappingNode]:
    modules = _get(document, "modules")
    entries = _entries(modules) if isinstance(modules, MappingNode) else []
    return [module for _, module in entries if isinstance(module, MappingNode)]


def _slices(holder: MappingNode) -> list[MappingNode]:
    slices = _get(holder, "slices")
    return _mappings(slices) if isinstance(slices, SequenceNode) else []


def _outputs_of(holder: MappingNode, scopes: list[MappingNode]) -> Iterator[_Output]:
    models = _get(holder, "models")
    if isinstance(models, SequenceNode):
        yield _Output(models, _mappings(models), scopes, None, is_slice=False)
    for part in _slices(holder):
        sources = _get(part, "sources")
        if isinstance(sources, SequenceNode):
            base_model = _get(part, "base_model")
            models_of_slice = _mappings(sources)
            yield _Output(sources, models_of_slice, [*scopes, part], base_model, is_slice=True)


def _mappings(sequence: SequenceNode) -> list[MappingNode]:
    return [node for node in sequence.value if isinstance(node, MappingNode)]


def _parameter(holder: MappingNode, name: str) -> Node | None:
    parameters = _get(holder, "parameters")
    return _get(parameters, name) if isinstance(parameters, MappingNode) else None


def _model_name(node: Node) -> str:
    """Return a model's name as written: a string, or a mapping with path and revision."""
    value = _plain(node)
    return (
        json.dumps(value, sort_keys=True, default=str) if isinstance(value, Mapping) else str(value)
    )


def _local_path(node: Node, made_here: set[str]) -> Path | None:
    """Return where a model is on this machine; ``None`` for one of the hub or of this config."""
    from mergekit.common import ModelReference  # takes seconds, which only --files needs

    name = _model_name(node)
    if name in made_here:
        return None
    try:
        path = Path(ModelReference.model_validate(_plain(node)).model.path)
    except ValueError:  # the config's own problem
        return None
    here = path.exists() or path.is_absolute() or name.startswith(".") or len(path.parts) > 2
    beside_others = len(path.parts) == 2 and path.parent.is_dir()  # not the hub's owner/name
    return path if here or beside_others else None


def _kind(parameter: ParameterSpec) -> str:
    kinds = {float: "number", int: "whole number", bool: "true or false"}
    return kinds.get(parameter.value_type, str(parameter.value_type))


def _all_parameter_names() -> set[str]:
    methods = merge_methods.registered_methods()
    return {parameter.name for method in methods for parameter in method.spec.parameters}


def _plain(node: Node) -> Any:
    """Return a node as Python values; resolves YAML's merge keys in place."""
    return yaml.SafeLoader("").construct_document(node)


def _entries(mapping: MappingNode) -> list[Entry]:
    return [(key, value) for key, value in mapping.value if isinstance(key, ScalarNode)]


def _get(mapping: MappingNode, name: str) -> Node | None:
    """Return a key's value, the last one as YAML takes it; ``None`` if it is null or absent."""
    found: list[Node] = [value for key, value in _entries(mapping) if key.value == name]
    return found[-1] if found and found[-1].tag != "tag:yaml.org,2002:null" else None


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
