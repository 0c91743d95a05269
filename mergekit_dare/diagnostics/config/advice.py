"""Rules on what a config asks for: valid, but perhaps not what was meant."""

from __future__ import annotations

import math
from typing import Any

from mergekit_dare.diagnostics.config.document import Document, InputList
from mergekit_dare.diagnostics.config.nodes import get, parameter, plain
from mergekit_dare.diagnostics.findings import Severity
from mergekit_dare.diagnostics.rules import Findings, rule

WARNING, HINT = Severity.WARNING, Severity.HINT
NARROW = ("bfloat16", "float16")


@rule
def normalize_with_negative_weights(document: Document) -> Findings:
    """Find weights that cancel out, or are negative, where normalize divides by their sum."""
    for inputs in document.input_lists:
        if not _is_normalized(document, inputs):
            continue
        found = [inputs.setting(model, "weight") for model in inputs.fine_tuned]
        values = [None if node is None else plain(node) for node in found]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        weights = [float(number) for number in numbers if abs(number) < 1e300]
        if len(weights) < len(values) or not weights:
            continue
        if abs(math.fsum(weights)) < 1e-8:
            message = "the weights cancel out, so normalize divides by 1, not their sum"
            yield document.finding(inputs.node, f"{message}; set normalize: false", WARNING)
        elif any(weight < 0 for weight in weights):
            message = "with negative weights, normalize divides by less than is added up"
            yield document.finding(inputs.node, f"{message}; set normalize: false", WARNING)


def _is_normalized(document: Document, inputs: InputList) -> bool:
    node = inputs.shared_setting("normalize")
    if node is not None:
        return plain(node) is True
    parameters = () if document.spec is None else document.spec.parameters
    return any(known.name == "normalize" and known.default is True for known in parameters)


def _densities(document: Document) -> list[Any]:
    """Return the density of every fine-tuned model; ``None`` where none is set."""
    nodes = [
        inputs.setting(model, "density")
        for inputs in document.input_lists
        for model in inputs.fine_tuned
    ]
    return [None if node is None else plain(node) for node in nodes]


@rule
def nothing_dropped(document: Document) -> Findings:
    """Find densities that are 1, or not set, for all models."""
    if not document.has_our_method:
        return
    values = _densities(document)
    if all(value is None for value in values):
        message = "no model has a density, so nothing is dropped; try density: 0.5"
        yield document.finding(document.root, message, WARNING)
    elif all(value is None or (value == 1 and value is not True) for value in values):
        message = "density is 1 everywhere, so nothing is dropped; try density: 0.5"
        yield document.finding(document.root, message, WARNING)


@rule
def everything_dropped(document: Document) -> Findings:
    """Find densities that are 0 for all models."""
    values = _densities(document) if document.has_our_method else []
    if values and all(value == 0 and value is not False for value in values):
        message = (
            "density is 0 everywhere, so everything is dropped and the result is the base model"
        )
        yield document.finding(document.root, f"{message}; try density: 0.5", WARNING)


@rule
def no_seed(document: Document) -> Findings:
    """Find a config without a seed, which alone does not determine the merge."""
    lists = document.input_lists
    holders = [holder for inputs in lists for holder in inputs.scopes + inputs.models]
    if document.has_our_method and not any(
        parameter(holder, "seed") for holder in [document.root, *holders]
    ):
        message = "no seed is set; with one, the config alone determines the merge: seed: 42"
        yield document.finding(document.root, message, HINT)


@rule
def float16_overflow(document: Document) -> Findings:
    """Find out_dtype: float16, where mergekit's own rounding may make numbers infinite."""
    node = get(document.root, "out_dtype")
    out = document.word("out_dtype")
    if node is None or not document.has_our_method or out == document.word("dtype"):
        return
    if out == "float16":
        message = (
            "mergekit rounds to float16 after the merge, and numbers above 65504 silently become "
            "infinite; with dtype: float16 that is an error"
        )
        yield document.finding(node, message, WARNING)


@rule
def rounding_without_effect(document: Document) -> Findings:
    """Find stochastic rounding that another rounding follows, or that has nothing to round."""
    nodes = [parameter(scope, "rounding") for i in document.input_lists for scope in i.scopes]
    dtype, out = document.word("dtype"), document.word("out_dtype")
    for node in {id(node): node for node in nodes if node is not None}.values():
        if plain(node) != "stochastic" or not document.has_our_method:
            continue
        if out is not None and out != dtype:
            message = f"after the merge, mergekit rounds to nearest, for out_dtype: {out}"
            yield document.finding(node, f"{message}; set dtype: {out} instead", WARNING)
        elif dtype is not None and dtype not in NARROW:
            message = (
                f"stochastic rounding has no effect in {dtype}; it is for bfloat16 and float16"
            )
            yield document.finding(node, message, WARNING)


@rule
def epsilon_of_della(document: Document) -> Findings:
    """Find a density and an epsilon of DELLA that leave no valid probability."""
    if document.spec is None or not document.spec.name.startswith("della"):
        return
    defaults = {p.name: p.default for p in document.spec.parameters}
    for inputs in document.input_lists:
        for model in inputs.fine_tuned:
            nodes = {name: inputs.setting(model, name) for name in ("density", "epsilon")}
            values: list[Any] = [
                defaults.get(n) if node is None else plain(node) for n, node in nodes.items()
            ]
            if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
                continue
            density, epsilon = values
            if 0 < density < 1 and not (density + epsilon < 1 and density - epsilon > 0):
                message = (
                    f"density {density:g} and epsilon {epsilon:g}: density + epsilon must be below "
                    "1, and density - epsilon above 0"
                )
                yield document.finding(nodes["epsilon"] or nodes["density"] or model, message)


RULES = (
    normalize_with_negative_weights,
    nothing_dropped,
    everything_dropped,
    no_seed,
    float16_overflow,
    rounding_without_effect,
    epsilon_of_della,
)
