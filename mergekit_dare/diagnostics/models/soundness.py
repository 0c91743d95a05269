"""Rules on each model that a config names: whether its files can be merged."""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub import constants
from yaml.nodes import Node

from mergekit_dare.diagnostics.config.document import Document
from mergekit_dare.diagnostics.findings import Finding, Severity
from mergekit_dare.diagnostics.models.description import ModelDescription
from mergekit_dare.diagnostics.models.files import looks_like_a_hub_name
from mergekit_dare.diagnostics.rules import Findings, rule


@dataclass(frozen=True)
class NamedModel:
    """A model, and where a config names it.

    Attributes:
        document: The config.
        node: Where it is first named.
        model: The model.

    """

    document: Document
    node: Node
    model: ModelDescription

    def finding(self, message: str, severity: Severity = Severity.ERROR) -> Finding:
        """Make a finding that points at the model's name."""
        return self.document.finding(self.node, message, severity)


@rule
def unusable_model(named: NamedModel) -> Findings:
    """Find a model that does not exist, or whose files are damaged, incomplete or not a model's."""
    yield from map(named.finding, named.model.files.problems)


@rule
def quantized_model(named: NamedModel) -> Findings:
    """Find a quantized model, whose codes a merge would take for weights."""
    if named.model.files.quantized is not None:
        yield named.finding(named.model.files.quantized)


@rule
def two_sets_of_weights(named: NamedModel) -> Findings:
    """Find a folder with two sets of weights, of which mergekit and transformers read one each."""
    if named.model.files.ambiguous is not None:
        yield named.finding(named.model.files.ambiguous, Severity.WARNING)


@rule
def unusable_adapter(named: NamedModel) -> Findings:
    """Find an adapter that does not exist, or is not an adapter."""
    yield from map(named.finding, named.model.adapter_problems)


@rule
def name_looked_up_on_the_hub(named: NamedModel) -> Findings:
    """Find a folder that mergekit looks up on the hub after the merge, which needs a network."""
    reference = named.model.reference
    adapter = [] if reference.lora is None else [reference.lora.path]
    if reference.model.path.endswith((".safetensors", ".bin", ".pt", ".pth")):
        return  # mergekit-pytorch writes no model card, so it asks nothing
    for name in filter(looks_like_a_hub_name, [reference.model.path, *adapter]):
        offline = constants.HF_HUB_OFFLINE
        message = (
            f"after the merge, mergekit asks the hub whether it has a model {name}, and fails "
            f"{'because HF_HUB_OFFLINE is set' if offline else 'without a network'}; write ./{name}"
        )
        yield named.finding(message, Severity.WARNING if offline else Severity.HINT)


RULES = (
    unusable_model,
    quantized_model,
    two_sets_of_weights,
    unusable_adapter,
    name_looked_up_on_the_hub,
)
