"""A config to start from: what ``mergekit-dare suggest`` writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import yaml
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_dare.diagnostics import checking
from mergekit_dare.diagnostics.config.document import Document
from mergekit_dare.diagnostics.config.reading import parse
from mergekit_dare.diagnostics.deltas import inspection
from mergekit_dare.diagnostics.examination import Examination
from mergekit_dare.diagnostics.findings import Finding, Severity
from mergekit_dare.diagnostics.models.compatibility import helpful_settings
from mergekit_dare.diagnostics.models.files import looks_like_a_hub_name
from mergekit_dare.kernel.formula import dtype_name
from mergekit_dare.plugin.headers import FLOATS

SEED = 42
# Written where nothing was measured.
UNKNOWN_DENSITY = 0.5


@dataclass(frozen=True)
class Setting:
    """A value, and the reason for it, which becomes a comment."""

    value: object
    reason: str


@dataclass(frozen=True)
class OfModel:
    """What is suggested for one model.

    Attributes:
        density: Its density.
        has_deltas: Whether it differs from the base model, so far as is known.
        sparse: Whether most of its elements equal the base model's, so far as is known.

    """

    density: Setting
    has_deltas: bool = True
    sparse: bool = False


@dataclass
class Suggestion:
    """What is suggested.

    Attributes:
        text: The config; empty if the models cannot be merged.
        findings: What ``check --files`` finds in the models.

    """

    text: str = ""
    findings: list[Finding] = field(default_factory=list)


def suggest(
    base: str, models: Sequence[str], method: str, options: MergeOptions | None = None
) -> Suggestion:
    """Examine models and suggest how to merge them.

    Args:
        base: The base model, as a config names it.
        models: The fine-tuned models.
        method: ``dare_linear`` or ``dare_ties``.
        options: mergekit's own, for loading models.

    Raises:
        Exception: whatever mergekit raises when it reads the weights.

    """
    unknown = [OfModel(Setting(UNKNOWN_DENSITY, "")) for _ in models]
    draft = Examination(_parse(_text(base, models, method, unknown, {})), options)
    shared = _shared_settings(draft)
    document = _parse(_text(base, models, method, unknown, shared))
    examination = Examination(document, options, draft.models)
    findings = checking.check([examination], files=True)
    if any(finding.severity is Severity.ERROR for finding in findings):
        return Suggestion(findings=findings)
    of_draft = checking.check([examination])
    of_models = [finding for finding in findings if finding not in of_draft]
    suggested = _of_models(examination, models)
    text = _text(base, models, method, suggested, shared)
    if any(model.sparse for model in suggested):
        change = inspection.inspect(Examination(_parse(text), options, draft.models)).change
        if change is not None and change.is_distorted:
            text = _text(base, models, method, suggested, shared, _stochastic(change))
    return Suggestion(text, checking.check([Examination(_parse(text))]) + of_models)


def _parse(text: str) -> Document:
    (document,) = parse(text, "suggestion")
    return document


def _shared_settings(draft: Examination) -> dict[str, Setting]:
    """Return the settings that the models need besides weights and densities."""
    try:
        comparisons = draft.comparisons
    except Exception:  # mergekit refuses the config: check reports why
        return {}
    shared: dict[str, Setting] = {}
    if (dtype := _dtype(draft)) is not None:
        shared["dtype"] = Setting(dtype, "as the base model is stored")
    words = {"tokenizer_source": "union", "chat_template": "auto"}
    for key, reason in helpful_settings(comparisons).items():
        shared[key] = Setting(words[key], reason)
    return shared


def _dtype(draft: Examination) -> str | None:
    """Return the dtype that most of the base model's tensors have."""
    assert draft.config.base_model is not None  # a suggestion names one
    stored = draft.models[draft.config.base_model].files.tensors.values()
    counts = Counter(tensor.dtype for tensor in stored if tensor.dtype in FLOATS)
    return dtype_name(FLOATS[counts.most_common(1)[0][0]]) if counts else None


def _of_models(examination: Examination, models: Sequence[str]) -> list[OfModel]:
    """Measure excerpts of the deltas, and return what suits each model."""
    if any(named.model.files.download for named in examination.named_models):
        reason = "not measured, as weights are not on this machine: see mergekit-dare inspect"
        return [OfModel(Setting(UNKNOWN_DENSITY, reason)) for _ in models]
    verdicts = inspection.inspect(examination).verdicts()
    of_models = [verdicts[str(ModelReference.parse(_named(model)))] for model in models]
    return [
        OfModel(
            Setting(verdict.density, f"{verdict.sentence}: {verdict.reason}"),
            has_deltas=verdict.kind != "no change",
            sparse=verdict.sparse,
        )
        for verdict in of_models
    ]


def _stochastic(change: inspection.MergedChange) -> Setting:
    reason = f"rounding to nearest would scale the merged change to {change.survives:.0%}"
    return Setting("stochastic", f"{reason} in {change.dtype}")


def _text(
    base: str,
    models: Sequence[str],
    method: str,
    of_models: Sequence[OfModel],
    shared: dict[str, Setting],
    rounding: Setting | None = None,
) -> str:
    weight = Setting(1.0, "its whole delta")
    if len(models) > 1:
        reason = "an equal share: the weights add up to 1, an average of the changes"
        weight = Setting(round(1 / len(models), 3), reason)
    lines = [f"merge_method: {method}", f"base_model: {_scalar(_named(base))}", "models:"]
    for model, suggested in zip(models, of_models, strict=True):
        without = Setting(weight.value, "without effect: it equals the base model")
        lines += [
            f"  - model: {_scalar(_named(model))}",
            "    parameters:",
            f"      {_line('weight', weight if suggested.has_deltas else without)}",
            f"      {_line('density', suggested.density)}",
        ]
    seed = Setting(SEED, "together with the models' weights, it decides what is dropped")
    lines += ["parameters:", f"  {_line('seed', seed)}"]
    if rounding is not None:
        lines.append(f"  {_line('rounding', rounding)}")
    lines += [_line(key, setting) for key, setting in shared.items()]
    return "\n".join(lines) + "\n"


def _named(model: str) -> str:
    """Return a model's name such that a folder cannot be mistaken for a model on the hub."""
    return f"./{model}" if looks_like_a_hub_name(model) else model


def _line(key: str, setting: Setting) -> str:
    reason = f" # {setting.reason}" if setting.reason else ""
    return f"{key}: {_scalar(setting.value)}{reason}"


def _scalar(value: object) -> str:
    """Return a value as YAML, on one line."""
    written: str = yaml.safe_dump(value, width=float("inf"), allow_unicode=True)
    return written.removesuffix("...\n").strip()
