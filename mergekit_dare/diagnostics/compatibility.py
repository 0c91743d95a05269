"""Whether models go together, told from their settings and tokenizers: no weight is read.

Each rule compares one model with the *donor*, the one whose settings the merged model takes: the
base model, or the first model where there is none. What the config itself sees to, as with
``tokenizer_source``, is no finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mergekit.architecture import arch_info_for_config
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from transformers import AutoConfig, PretrainedConfig
from yaml.nodes import Node

from mergekit_dare.diagnostics import vocabulary
from mergekit_dare.diagnostics.document import Document
from mergekit_dare.diagnostics.findings import Finding, Severity, cut, shown
from mergekit_dare.diagnostics.model_files import ModelFiles
from mergekit_dare.diagnostics.vocabulary import Vocabulary

ERROR, WARNING = Severity.ERROR, Severity.WARNING
Said = Iterator[tuple[Severity, str]]

# A few tokens that moved spoil a few rows; more of them, and the embeddings of other tokens are
# averaged.
MOST_MOVED = 0.01
EXAMPLES = 3


@dataclass(frozen=True)
class Described:
    """A model, and what its files say of it.

    Attributes:
        name: How the config names it.
        files: What was found.
        override: The architecture that the config names in place of its own.

    """

    name: str
    files: ModelFiles
    override: str | None = None

    @cached_property
    def config(self) -> PretrainedConfig | None:
        """Its settings as transformers reads them, which fills in what older files leave out."""
        try:
            config = AutoConfig.from_pretrained(self.files.folder, trust_remote_code=False)
        except Exception:  # code of its own, a type of another release, or nonsense
            return None
        if self.override:
            config.architectures = [self.override]
        return config

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All of its settings by their last name, those of a text model inside it too."""
        try:
            config = self.files.config if self.config is None else self.config.to_dict()
        except Exception:
            config = self.files.config
        return _flat(config, depth=3)

    @cached_property
    def tokenizer(self) -> Vocabulary | ValueError | None:
        """What its tokenizer knows, or why it cannot be read; ``None`` if it has none."""
        try:
            return vocabulary.read(self.files)
        except ValueError as error:
            return error

    @property
    def vocabulary(self) -> Vocabulary | None:
        """What its tokenizer knows, if it has one that can be read."""
        return None if isinstance(self.tokenizer, ValueError) else self.tokenizer


@dataclass(frozen=True)
class Context:
    """What the config sees to itself.

    Attributes:
        donor: Whose settings the merged model takes.
        layers: Whether all layers of all models are merged with each other.
        tokenizer: Whether it brings the vocabularies into one order.
        template_of: The model whose chat template the output has; ``None`` if the config sets it.

    """

    donor: Described
    layers: bool
    tokenizer: bool
    template_of: Described | None


def check(
    document: Document,
    config: MergeConfiguration,
    nodes: Mapping[ModelReference, Node],
    examined: Mapping[ModelReference, ModelFiles],
) -> Iterator[Finding]:
    """Compare every model of a config with the one whose settings the merged model takes."""
    described, context = _describe(config, examined)
    if context is None:
        return
    donor = context.donor
    for model, subject in described.items():
        for rule in ALONE:
            for severity, message in rule(subject, context):
                yield document.finding(nodes[model], message, severity)
    for model, subject in described.items():
        if subject is donor:
            continue
        found = [(s, m) for rule in RULES for s, m in rule(subject, context)]
        # Of another architecture, all else is another, too.
        for severity, message in found[:1] if _other_architecture(subject, donor) else found:
            yield document.finding(nodes[model], message, severity)


def helpful_settings(
    config: MergeConfiguration, examined: Mapping[ModelReference, ModelFiles]
) -> dict[str, str]:
    """Return the settings of a config that see to what tokenizers differ in, with the reason."""
    described, context = _describe(config, examined)
    if context is None:
        return {}
    others = [subject for subject in described.values() if subject is not context.donor]
    found = {}
    if any(list(tokens(subject, context)) for subject in others):
        found["tokenizer_source"] = "the models' tokens are not the same"
    if any(list(chat_template(subject, context)) for subject in others):
        found["chat_template"] = "the models' chat templates are not the same"
    return found


def _describe(
    config: MergeConfiguration, examined: Mapping[ModelReference, ModelFiles]
) -> tuple[dict[ModelReference, Described], Context | None]:
    """Return the models that are folders, and what they are compared with, if it is one."""
    described = {
        model: Described(str(model), files, model.override_architecture)
        for model, files in examined.items()
        if files.folder is not None
    }
    first = config.base_model or config.referenced_models()[0]
    if first not in described:
        return described, None
    tokenizer = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    template_of: Described | None = described[first]
    if config.chat_template:
        template_of = None
    elif isinstance(tokenizer, ModelReference):
        template_of = described.get(tokenizer)
    return described, Context(
        described[first],
        layers=config.slices is None,
        tokenizer=bool(tokenizer),
        template_of=template_of,
    )


def pickled(subject: Described, context: Context) -> Said:
    """Find models whose tensors cannot be looked at."""
    del context
    if subject.files.is_pickled:
        yield (
            WARNING,
            (
                f"the weights of {subject.name} are pickled only: a pickle can run code, and its "
                "tensors are not checked here; take a copy in safetensors, or use --lazy-unpickle"
            ),
        )


def damaged_tokenizer(subject: Described, context: Context) -> Said:
    """Find tokenizers that cannot be read."""
    if isinstance(subject.tokenizer, ValueError):
        needed = subject is context.donor or context.tokenizer
        yield ERROR if needed else WARNING, str(subject.tokenizer)


def architecture(subject: Described, context: Context) -> Said:
    """Find models of another architecture, by mergekit's own description where it has one."""
    if _other_architecture(subject, context.donor):
        donor = context.donor
        kinds = [
            cut(f"{', '.join(map(str, _architectures(d)))} ({d.settings.get('model_type')})")
            for d in (subject, donor)
        ]
        yield (
            ERROR,
            (
                f"{subject.name} is a {kinds[0]}, {donor.name} is a {kinds[1]}: mergekit refuses "
                "to mix architectures (without --allow-crimes); merge models that were fine-tuned "
                f"from {donor.name}"
            ),
        )


def _other_architecture(subject: Described, donor: Described) -> bool:
    if subject.settings.get("model_type") != donor.settings.get("model_type"):
        return True
    try:
        ours, theirs = (arch_info_for_config(d.config) for d in (subject, donor))
    except Exception:
        return False
    return ours is not None and theirs is not None and ours != theirs


def _architectures(subject: Described) -> list[Any]:
    found = subject.settings.get("architectures")
    return found if isinstance(found, list) and found else ["model of no named architecture"]


# The number that each setting counts, in the names of several families.
COUNTS = {
    "num_attention_heads": "attention heads",
    "n_head": "attention heads",
    "n_heads": "attention heads",
    "num_key_value_heads": "key-value heads",
    "num_local_experts": "experts",
    "num_experts": "experts",
}
LAYERS = {"num_hidden_layers": "layers", "n_layer": "layers", "n_layers": "layers"}
SIZES = {
    "hidden_size": "hidden size",
    "n_embd": "hidden size",
    "dim": "hidden size",
    "intermediate_size": "intermediate size",
    "n_inner": "intermediate size",
    "hidden_dim": "intermediate size",
    "head_dim": "head size",
}


def sizes(subject: Described, context: Context) -> Said:
    """Find models of another size."""
    donor = context.donor
    numbers = COUNTS | SIZES | (LAYERS if context.layers else {})
    differences = []
    for key, noun in numbers.items():
        ours, theirs = subject.settings.get(key), donor.settings.get(key)
        if isinstance(ours, int) and isinstance(theirs, int) and ours != theirs:
            what = f"{noun} {ours}" if key in SIZES else f"{ours} {noun}"
            differences.append(f"{what} (not {theirs})")
    if differences:
        yield (
            ERROR,
            (
                f"{subject.name} has {', '.join(dict.fromkeys(differences))}: it is no version of "
                f"{donor.name}, and their tensors cannot be merged"
            ),
        )


# What a merged model does not do as the model did, if it takes another's setting.
MEANINGS = {
    "rope_theta": "sees other positions than it was trained with",
    "rope_scaling": "sees other positions than it was trained with",
    "partial_rotary_factor": "sees other positions than it was trained with",
    "sliding_window": "looks back less far or farther",
    "rms_norm_eps": "normalizes otherwise",
    "layer_norm_eps": "normalizes otherwise",
    "layer_norm_epsilon": "normalizes otherwise",
    "hidden_act": "has another activation",
    "hidden_activation": "has another activation",
    "activation_function": "has another activation",
    "max_position_embeddings": "is made for other lengths of text",
    "n_positions": "is made for other lengths of text",
}


def meaning(subject: Described, context: Context) -> Said:
    """Find settings that change what the same weights do."""
    donor = context.donor
    for key, effect in MEANINGS.items():
        ours, theirs = subject.settings.get(key), donor.settings.get(key)
        if ours != theirs:
            yield (
                WARNING,
                (
                    f"{key} of {subject.name} is {shown(ours)}, {shown(theirs)} in {donor.name}, "
                    "whose settings the merged model takes: what came from "
                    f"{subject.name} {effect}; set it in the merged config.json as the model that "
                    "matters most has it"
                ),
            )


def tied_embeddings(subject: Described, context: Context) -> Said:
    """Find models of which one has an lm_head of its own."""
    donor = context.donor
    ours, theirs = (bool(d.settings.get("tie_word_embeddings")) for d in (subject, donor))
    if ours == theirs:
        return
    lost = "its lm_head is left out" if theirs else "its embeddings stand in for the lm_head"
    yield (
        WARNING,
        (
            f"tie_word_embeddings of {subject.name} is {ours}, {theirs} in {donor.name}, whose "
            f"settings the merged model takes: {lost}"
        ),
    )


def tokens(subject: Described, context: Context) -> Said:
    """Find tokens with other ids, or that only one of two models has."""
    ours, theirs = subject.vocabulary, context.donor.vocabulary
    if context.tokenizer or ours is None or theirs is None or not ours.ids or not theirs.ids:
        return
    donor = context.donor.name
    shared = ours.ids.keys() & theirs.ids.keys()
    moved = [
        token for token in ours.ids if token in shared and ours.ids[token] != theirs.ids[token]
    ]
    if moved:
        examples = [f"{t!r} {ours.ids[t]} and {theirs.ids[t]}" for t in moved]
        many = len(moved) > MOST_MOVED * len(shared)
        yield (
            ERROR if many else WARNING,
            (
                f"{_number(moved)} of {subject.name} {_have(moved)} other ids than in {donor} "
                f"({_examples(examples)}): the embeddings of different tokens would be merged; set "
                "tokenizer_source: base, or union"
            ),
        )
    here, there = (
        [t for t in ours.ids if t not in shared],
        [t for t in theirs.ids if t not in shared],
    )
    if here:
        yield (
            WARNING,
            (
                f"{_number(here)} of {subject.name} ({_examples(map(repr, here))}) "
                f"{_are(here)} unknown to {donor}, whose tokenizer the merged model takes; set "
                f"tokenizer_source: union, or {subject.name}"
            ),
        )
    elif there:
        yield (
            WARNING,
            (
                f"{_number(there)} of {donor} ({_examples(map(repr, there))}) {_are(there)} not in "
                f"{subject.name}: whatever stands in its rows is merged; set tokenizer_source: base"
            ),
        )


def special_tokens(subject: Described, context: Context) -> Said:
    """Find other first, last and padding tokens, where both models have one."""
    if context.tokenizer:
        return
    donor = context.donor
    for key in vocabulary.SPECIAL:
        ours, theirs = _special(subject, key), _special(donor, key)
        if ours is None or theirs is None:
            ours, theirs = (_special_id(d, key) for d in (subject, donor))
        if ours is not None and theirs is not None and ours != theirs:
            yield (
                WARNING,
                (
                    f"{key} of {subject.name} is {cut(ours)}, {cut(theirs)} in {donor.name}, whose "
                    f"tokenizer the merged model takes: {_SPECIAL_EFFECTS[key]}; set "
                    f"tokenizer_source: {subject.name} if the merged model is to be used as that "
                    "one is"
                ),
            )


_SPECIAL_EFFECTS = {
    "bos_token": "a text may begin otherwise than it was trained with",
    "eos_token": "it may not know where to stop",
    "pad_token": "padded batches may differ",
}


def _special(subject: Described, key: str) -> str | None:
    token = None if subject.vocabulary is None else subject.vocabulary.special.get(key)
    return None if token is None else repr(token)


def _special_id(subject: Described, key: str) -> str | None:
    number = subject.settings.get(f"{key}_id")
    return None if number is None else f"id {number}"


def chat_template(subject: Described, context: Context) -> Said:
    """Find chat templates that the merged model will not have."""
    giver = context.template_of
    if giver is None or giver is subject or subject.vocabulary is None:
        return
    ours = subject.vocabulary.template
    theirs = None if giver.vocabulary is None else giver.vocabulary.template
    if ours is None or (theirs is not None and ours.strip() == theirs.strip()):
        return
    other = "has none" if theirs is None else "has another"
    yield (
        WARNING,
        (
            f"{subject.name} has a chat template, and {giver.name}, whose tokenizer the merged "
            f"model takes, {other}: the merged model will not be asked as it was trained; set "
            "chat_template: auto"
        ),
    )


ALONE: tuple[Callable[[Described, Context], Said], ...] = (pickled, damaged_tokenizer)
RULES: tuple[Callable[[Described, Context], Said], ...] = (
    architecture,
    sizes,
    meaning,
    tied_embeddings,
    tokens,
    special_tokens,
    chat_template,
)


def _flat(config: Mapping[str, Any], depth: int) -> dict[str, Any]:
    """Return all settings by their last name; the outer one counts, if there are two."""
    inner: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("rope_scaling", "rope_parameters"):
            if isinstance(value, dict):
                rest = dict(value)
                if "rope_theta" in rest:
                    found["rope_theta"] = rest.pop("rope_theta")
                # transformers writes out what is the default
                if rest.get("rope_type", rest.get("type")) not in (None, "default"):
                    found["rope_scaling"] = rest
                elif any(isinstance(part, dict) for part in rest.values()):
                    found["rope_scaling"] = rest  # of each kind of layer
            continue
        if isinstance(value, dict) and depth and key.endswith("_config"):
            inner |= _flat(value, depth - 1)
        found.setdefault(key, value)
    return inner | found


def _number(tokens: list[str]) -> str:
    return "1 token" if len(tokens) == 1 else f"{len(tokens):,} tokens"


def _have(tokens: list[str]) -> str:
    return "has" if len(tokens) == 1 else "have"


def _are(tokens: list[str]) -> str:
    return "is" if len(tokens) == 1 else "are"


def _examples(texts: Any) -> str:
    found = [cut(text) for text, _ in zip(texts, range(EXAMPLES + 1), strict=False)]
    return ", ".join(found[:EXAMPLES]) + (", ..." if len(found) > EXAMPLES else "")
