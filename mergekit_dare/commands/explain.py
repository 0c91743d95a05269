"""The command ``mergekit-dare explain``."""

from __future__ import annotations

import json

import click

import mergekit_dare
from mergekit_dare.commands import explain_text
from mergekit_dare.diagnostics import checking
from mergekit_dare.diagnostics.config import reading
from mergekit_dare.diagnostics.examination import Examination
from mergekit_dare.diagnostics.findings import Severity, UnusableFileError, cut, reason
from mergekit_dare.diagnostics.plan import patterns
from mergekit_dare.diagnostics.plan.explanation import ExplainedTensor, Explanation

# Rules on what is an error, but not why mergekit cannot plan a merge.
_IGNORED_BY_MERGEKIT = (
    "unknown-key",
    "unknown-parameter",
    "misplaced-parameter",
    "shared-parameter-of-a-model",
    "repeated-key",
)


@click.command("explain")
@click.argument("config")
@click.option(
    "--tensors",
    metavar="GLOB",
    help="Show each tensor whose name matches: '*.mlp.*', 'model.layers.{0-3}.*'.",
)
@click.option("--json", "as_json", is_flag=True, help="Print every tensor's values as JSON.")
@click.option("--name", help="Which config of a file for mergekit-multi.")
def command(config: str, tensors: str | None, as_json: bool, name: str | None) -> None:
    """Say what each tensor gets by CONFIG, without reading a weight.

    The values are those of mergekit's own plan, tensors with equal ones in one line. A range, 0.2
    to 0.8, runs over the layers. Exit code 0: done; 2: the config or a model cannot be used.
    """
    explanation = _explain(config, name)
    chosen = None if tensors is None else _chosen(explanation, tensors)
    if as_json:
        found = explain_text.as_json(explanation, chosen)
        click.echo(json.dumps(found, indent=1, allow_nan=False))
    else:
        click.echo(explain_text.as_text(explanation, chosen))


def _explain(path: str, name: str | None) -> Explanation:
    """Return what a config means.

    Raises:
        UnusableFileError: the config or a model of it cannot be used; in one sentence.

    """
    mergekit_dare.register()
    documents = reading.read(path)
    document = reading.choose_among(documents, name)
    made_here = {other.name for other in documents if other.name}
    examination = Examination(document, made_here=made_here)
    for model in document.model_nodes:
        if model.model.path in made_here:
            raise UnusableFileError(
                f"{path}: {model} is a merge of the same file, whose tensors are not there yet: "
                f"explain it by itself with --name {model}, or merge it and name its folder here"
            )
    try:
        plan = examination.plan
    except Exception as error:
        raise _refusal(examination, error) from error
    for named in examination.named_models:
        for problem in named.model.files.why_unusable + named.model.adapter_problems:
            raise UnusableFileError(problem)
    if plan.would_fetch_weights:
        raise UnusableFileError(
            f"mergekit does not know the architecture of the models of {path}, and would fetch "
            "their weights from the hub to plan the merge; give the models as folders"
        )
    explanation = Explanation(plan)
    try:
        assert explanation.tensors is not None  # they are planned now
    except Exception as error:
        raise _refusal(examination, error) from error
    return explanation


def _refusal(examination: Examination, error: Exception) -> UnusableFileError:
    """Return the first error that check finds in a config, or else what mergekit says of it."""
    path = examination.document.path
    for finding in checking.check([examination], ignored=_IGNORED_BY_MERGEKIT):
        if finding.severity is Severity.ERROR:
            return UnusableFileError(f"{path}:{finding.line}: {finding.message}")
    return UnusableFileError(f"{path}: mergekit cannot plan this merge: {cut(reason(error))}")


def _chosen(explanation: Explanation, pattern: str) -> list[ExplainedTensor]:
    wanted = patterns.compiled(pattern)
    found = [tensor for tensor in explanation.tensors if wanted.fullmatch(tensor.name)]
    if not found:
        raise UnusableFileError(
            f"no tensor's name matches {pattern}; names are like {explanation.tensors[0].name}, "
            f"and * stands for any text: --tensors '*{pattern.strip('*')}*'"
        )
    return found
