"""Whether the merged model will have every weight that its class needs.

mergekit merges what its description of an architecture names. What a model stores beside that is
left out silently, and transformers fills it with random numbers when the merged model is loaded.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.merge_methods import OptionalTensorPolicy

from mergekit_dare.diagnostics.findings import Severity, are, cut, reason, some_tensors
from mergekit_dare.diagnostics.models import loading
from mergekit_dare.diagnostics.models.description import ModelDescription
from mergekit_dare.diagnostics.models.files import examine
from mergekit_dare.diagnostics.models.loading import Loading
from mergekit_dare.diagnostics.models.stored import BUFFERS
from mergekit_dare.diagnostics.plan.merge_plan import MergePlan, PlannedTensor
from mergekit_dare.diagnostics.rules import Findings, rule
from mergekit_dare.plugin.headers import StoredTensor

BY_NAME = "merge with mergekit-dare by-name, which needs no description"
MOST_PARTS = 3


@dataclass(frozen=True)
class Outcome:
    """What comes of loading the merged model.

    Attributes:
        lost: The parameters that it lacks, and the donor does not.
        refusal: Why transformers cannot load it.

    """

    lost: frozenset[str] = frozenset()
    refusal: str | None = None


@functools.lru_cache(maxsize=8)
def outcome(plan: MergePlan) -> Outcome:
    """Load the merged model without data, unless it stores all that the donor stores.

    Nothing is known of a merge of slices, whose layers are not those of the donor.
    """
    donor = plan.models[plan.donor]
    merged = _merged(plan)
    if plan.is_of_slices or donor.files.tensors.keys() <= merged.keys():
        return Outcome()
    before = as_stored(plan)
    if before is None:
        return Outcome()
    try:
        after = loading.load(donor, merged)
    except Exception as error:
        return Outcome(refusal=reason(error))
    return Outcome() if after is None else Outcome(after.missing - before.missing)


@functools.lru_cache(maxsize=8)
def as_stored(plan: MergePlan) -> Loading | None:
    """Load the donor without data; ``None`` if its class is not known."""
    donor = plan.models[plan.donor]
    try:
        return loading.load(donor, donor.files.tensors)
    except Exception:  # code of its own, or settings of another release
        return None


def warning_of(model: ModelReference, folder: str, planned: Iterable[str]) -> str | None:
    """Say what a merged model will lack; ``None`` if nothing, or if that is not known.

    Args:
        model: The base model.
        folder: Where its files are.
        planned: The names of the merged model's tensors.

    """
    donor = ModelDescription(model, examine(Path(folder)))
    stored = donor.files.tensors
    merged = {name: stored.get(name, StoredTensor("F32", ())) for name in planned}
    before, after = loading.load(donor, stored), loading.load(donor, merged)
    if before is None or after is None:
        return None
    # Of slices, some layers are left out on purpose: what counts is what is in none.
    kept = {_pattern(name) for name in after.parameters - after.missing}
    lost = {n for n in after.missing - before.missing if _pattern(n) not in kept}
    if not lost:
        return None
    parts = in_words(lost, after.parameters)
    return (
        f"the merged model will lack {parts}, which mergekit's description of this architecture "
        "leaves out: mergekit-dare by-name merges it whole"
    )


def is_whole(plan: MergePlan) -> bool:
    """Tell whether the donor has all that its class needs, so far as that is known."""
    before = None if plan.is_of_slices else as_stored(plan)
    return before is not None and not before.missing


def have_the_same_names(plan: MergePlan) -> bool:
    """Tell whether all models store tensors of the same names."""
    names = [plan.models[m].files.tensors.keys() for m in plan.config.referenced_models()]
    return bool(names[0]) and all(other == names[0] for other in names)


def _merged(plan: MergePlan) -> dict[str, StoredTensor]:
    """Return the tensors of the merged model: those that at least one model has."""
    merged = {}
    for tensor in filter(_is_merged, plan.tensors):
        stored = next((found for found in tensor.inputs.values() if found is not None), None)
        if stored is not None:
            merged[tensor.task.output_weight.name] = stored
    return merged


def _is_merged(tensor: PlannedTensor) -> bool:
    """Tell whether mergekit does not skip a tensor: one that is optional, and not in the base."""
    task = tensor.task
    present = [model for model, stored in tensor.inputs.items() if stored is not None]
    if len(present) == len(task.model_order) or not task.output_weight.optional:
        return True
    spec = merge_methods.get(task.method_name).spec
    if spec.optional_tensor_policy != OptionalTensorPolicy.BASE_OR_SKIP:
        return True
    return len(present) >= spec.contract.min_inputs or present == [task.base_model]


def what_is_lost(plan: MergePlan) -> str | None:
    """Say what the merged model lacks, and why; ``None`` if nothing, or if that is not known."""
    lost, before = outcome(plan).lost, as_stored(plan)
    if not lost or before is None:
        return None
    return (
        f"the merged model lacks {in_words(lost, before.parameters)}: mergekit's "
        "description of this architecture leaves them out, and transformers fills them with random "
        f"numbers; {BY_NAME}"
    )


@rule
def lost_weights(plan: MergePlan) -> Findings:
    """Find weights that the merged model needs, and that mergekit would silently leave out."""
    refusal = outcome(plan).refusal
    if refusal is not None:
        message = f"transformers could not load the merged model: {cut(refusal)}; {BY_NAME}"
        yield plan.finding(plan.donor, message)
    elif (lost := what_is_lost(plan)) is not None:
        yield plan.finding(plan.donor, lost)


@rule
def left_out_tensor(plan: MergePlan) -> Findings:
    """Find a tensor of the base model that is in no output."""
    donor, found = plan.donor, outcome(plan)
    left = [] if plan.is_of_slices or found.lost or found.refusal else left_out(plan, donor)
    if not left:
        return
    before = as_stored(plan)
    if before is None:
        message = (
            f"{some_tensors(left)} of {donor} {are(left)} in no output: mergekit's description of "
            "this architecture does not name them, and the merged model will lack them"
        )
        yield plan.finding(donor, message, Severity.WARNING)
    elif left := [name for name in left if name not in before.used]:
        message = (
            f"{some_tensors(left)} of {donor} {are(left)} in no output, and its class does not use "
            f"{'it' if len(left) == 1 else 'them'}"
        )
        yield plan.finding(donor, message, Severity.HINT)


# Settings that say whether a model has some of its tensors.
_SWITCHES = ("attention_bias", "qkv_bias", "mlp_bias", "use_bias", "use_qk_norm", "bias")


@rule
def only_in_a_fine_tuned_model(plan: MergePlan) -> Findings:
    """Find tensors that only a fine-tuned model has, so that they are not merged."""
    donor = plan.donor
    of_donor = plan.models[donor]
    for model in [] if plan.is_of_slices or not of_donor.files.tensors else plan.nodes:
        described = plan.models[model]
        left = [name for name in left_out(plan, model) if name not in of_donor.files.tensors]
        if model == donor or not left:
            continue
        ours, theirs = described.settings, of_donor.settings
        switches = [
            f"{key} is {ours[key]} in its config.json, {theirs.get(key)} in that of {donor}"
            for key in _SWITCHES
            if key in ours and ours[key] != theirs.get(key)
        ]
        because = f" ({'; '.join(switches)})" if switches else ""
        message = (
            f"the merged model will not have {in_words(left, described.files.tensors)}, which only "
            f"{model} has, and not {donor}{because}"
        )
        yield plan.finding(model, message, Severity.WARNING)


def left_out(plan: MergePlan, model: ModelReference) -> list[str]:
    """Return the names of a model's tensors that no output is made of, but buffers."""
    files = plan.models[model].files
    merged = filter(_is_merged, plan.tensors)
    used = {name for tensor in merged for name in tensor.used.get(model, ())}
    # A tied pair is stored once or twice; the plan takes the one.
    left = [name for name in files.tensors if name not in used and not name.endswith(BUFFERS)]
    if files.config.get("tie_word_embeddings"):
        left = [name for name in left if "lm_head" not in name]
    return left


def in_words(lost: Iterable[str], parameters: Iterable[str]) -> str:
    """Say which parts of a model parameters are: whole modules, and which layers have them.

    ``lost`` are some of the ``parameters``, which are all of the model's.
    """
    parameters = frozenset(parameters)
    groups: dict[str, list[str]] = {}
    for part in _whole_parts(lost, parameters):
        groups.setdefault(_pattern(part), []).append(part)
    texts = [
        _group_in_words(pattern, parts, parts[0] in parameters) for pattern, parts in groups.items()
    ]
    if len(texts) > MOST_PARTS:
        texts[MOST_PARTS:] = [f"{len(texts) - MOST_PARTS} more of its parts"]
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _whole_parts(lost: Iterable[str], parameters: Iterable[str]) -> list[str]:
    """Return the largest modules of which all parameters are lost, and single parameters."""
    lost = sorted(lost, key=_in_natural_order)
    of_all = Counter(part for name in parameters for part in _prefixes(name))
    of_lost = Counter(part for name in lost for part in _prefixes(name))
    whole = (next(p for p in _prefixes(name) if of_lost[p] >= of_all[p]) for name in lost)
    return list(dict.fromkeys(whole))


def _prefixes(name: str) -> Iterator[str]:
    """Yield the modules that a parameter lies in, the outermost first, and the parameter."""
    parts = name.split(".")
    yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _in_natural_order(name: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]


def _group_in_words(pattern: str, parts: list[str], is_parameter: bool) -> str:
    """Say what parts of one pattern are, as in ``the experts of layer 1 and 30 more layers``."""
    steps = pattern.split(".")
    names = [step.replace("_", " ") for step in steps if step != "*"]
    what = f"{names[-1]} of the {names[-2]}" if is_parameter and names[1:] else names[-1]
    if "*" not in steps:
        return f"{'the' if is_parameter else 'all of the'} {what} ({pattern})"
    first = re.findall(r"(?<=\.)\d+(?=\.|$)", parts[0])[0]
    more = len(parts) - 1
    others = f" and {more} more layer{'s' if more > 1 else ''}" if more else ""
    what = "all" if steps[-1] == "*" else f"the {what}"
    return f"{what} of layer {first}{others} ({pattern})"


RULES = (lost_weights, left_out_tensor, only_in_a_fine_tuned_model)
