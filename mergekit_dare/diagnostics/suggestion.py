"""A config to start from: what ``mergekit-dare suggest`` writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import yaml
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_dare.diagnostics import compatibility, files_check, inspection
from mergekit_dare.diagnostics.config_check import check_documents
from mergekit_dare.diagnostics.document import Document, parse
from mergekit_dare.diagnostics.findings import Finding, Severity
from mergekit_dare.diagnostics.host import configuration
from mergekit_dare.diagnostics.model_files import ModelFiles
from mergekit_dare.diagnostics.samples import DTYPES

SEED = 42
# What is written where nothing was measured.
UNKNOWN_DENSITY = 0.5


@dataclass(frozen=True)
class Setting:
    """A value, and the reason that stands behind it as a comment."""

    value: object
    reason: str


@dataclass
class Suggestion:
    """What is suggested.

    Attributes:
        text: The config; empty if the models cannot be merged.
        findings: What ``check --files`` says of the models.

    """

    text: str = ""
    findings: list[Finding] = field(default_factory=list)


def suggest(
    base: str, models: Sequence[str], method: str, options: MergeOptions | None = None
) -> Suggestion:
    """Look at models and suggest how to merge them.

    Args:
        base: The base model, as a config names it.
        models: The fine-tuned models.
        method: ``dare_linear`` or ``dare_ties``.
        options: mergekit's own, for loading models.

    Raises:
        Exception: whatever mergekit raises when it reads the weights.

    """
    unknown = [Setting(UNKNOWN_DENSITY, "") for _ in models]
    document = _parse(_text(base, models, method, unknown, {}))
    examined, _ = files_check.examine(document, set())
    shared: dict[str, Setting] = {}
    try:
        config = configuration(document)
    except Exception:  # check says why
        return Suggestion(findings=check_documents([document], files=True))
    if (dtype := _dtype(config, examined)) is not None:
        shared["dtype"] = Setting(dtype, "as the models are stored")
    words = {"tokenizer_source": "union", "chat_template": "auto"}
    for key, reason in compatibility.helpful_settings(config, examined).items():
        shared[key] = Setting(words[key], reason)
    document = _parse(_text(base, models, method, unknown, shared))
    findings = check_documents([document], files=True)
    if any(finding.severity is Severity.ERROR for finding in findings):
        return Suggestion(findings=findings)
    densities = _densities(document, models, examined, options)
    text = _text(base, models, method, densities, shared)
    return Suggestion(text, check_documents([_parse(text)], files=True))


def _parse(text: str) -> Document:
    (document,) = parse(text, "suggestion")
    return document


def _dtype(config: MergeConfiguration, examined: dict[ModelReference, ModelFiles]) -> str | None:
    """Return the dtype that most of the base's tensors have."""
    base = examined.get(config.base_model) if config.base_model else None
    if base is None:
        return None
    counts = Counter(t.dtype for t in base.tensors.values() if t.dtype in DTYPES)
    return str(DTYPES[counts.most_common(1)[0][0]]).removeprefix("torch.") if counts else None


def _densities(
    document: Document,
    models: Sequence[str],
    examined: dict[ModelReference, ModelFiles],
    options: MergeOptions | None,
) -> list[Setting]:
    """Measure a sample of the deltas, and say what density suits each model."""
    if any(files.download for files in examined.values()):
        reason = "not measured, as its weights are not on this machine: see mergekit-dare inspect"
        return [Setting(UNKNOWN_DENSITY, reason) for _ in models]
    report = inspection.inspect_document(document, options)
    verdicts = report.verdicts()
    of_models = [verdicts[str(ModelReference.parse(_named(model)))] for model in models]
    return [
        Setting(verdict.density, f"{verdict.sentence}: {verdict.reason}") for verdict in of_models
    ]


def _text(
    base: str,
    models: Sequence[str],
    method: str,
    densities: Sequence[Setting],
    shared: dict[str, Setting],
) -> str:
    weight = Setting(1.0, "all of its change")
    if len(models) > 1:
        weight = Setting(round(1 / len(models), 2), "an equal share; deltas are summed")
    lines = [f"merge_method: {method}", f"base_model: {_scalar(_named(base))}", "models:"]
    for model, density in zip(models, densities, strict=True):
        lines += [
            f"  - model: {_scalar(_named(model))}",
            "    parameters:",
            f"      {_line('weight', weight)}",
            f"      {_line('density', density)}",
        ]
    seed = Setting(SEED, "with the weights, it decides what is dropped")
    lines += ["parameters:", f"  {_line('seed', seed)}"]
    lines += [_line(key, setting) for key, setting in shared.items()]
    return "\n".join(lines) + "\n"


def _named(model: str) -> str:
    """Return a folder's name so that it cannot be one of the hub."""
    return f"./{model}" if files_check.looks_like_the_hubs(model) else model


def _line(key: str, setting: Setting) -> str:
    reason = f" # {setting.reason}" if setting.reason else ""
    return f"{key}: {_scalar(setting.value)}{reason}"


def _scalar(value: object) -> str:
    """Write a value as YAML has it, on one line."""
    written: str = yaml.safe_dump(value, width=float("inf"), allow_unicode=True)
    return written.removesuffix("...\n").strip()
