"""Rules on whether models fit together, judged by their settings and tokenizers.

Each rule compares one model with the *donor*, the one whose settings the merged model inherits: the
base model, or the first model where there is none. What the config itself takes care of, as with
``tokenizer_source``, is not a finding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mergekit.architecture import arch_info_for_config

from mergekit_dare.diagnostics.findings import Severity, are, cut, shown
from mergekit_dare.diagnostics.models import tokenizer
from mergekit_dare.diagnostics.models.description import ModelDescription
from mergekit_dare.diagnostics.models.soundness import NamedModel
from mergekit_dare.diagnostics.rules import Findings, rule

ERROR, WARNING = Severity.ERROR, Severity.WARNING

# A few moved tokens spoil a few rows; above this share, the vocabularies are in different orders.
MOST_MOVED = 0.01
EXAMPLES = 3


@dataclass(frozen=True)
class Comparison(NamedModel):
    """A model, what it is compared with, and what the config itself takes care of.

    Attributes:
        donor: The model whose settings the merged model inherits.
        with_layers: Whether all layers of all models are merged with each other.
        with_tokenizer: Whether the config makes mergekit align the vocabularies.
        tokenizer_of: The model whose tokenizer the config chooses; ``None`` if it chooses none.
        template_of: The model whose chat template the output has; ``None`` if the config sets it.

    """

    donor: ModelDescription
    with_layers: bool
    with_tokenizer: bool
    tokenizer_of: ModelDescription | None
    template_of: ModelDescription | None


@rule
def pickled_weights(compared: Comparison) -> Findings:
    """Find weights that are available only as pickles, which can run code and are not checked."""
    if compared.model.files.is_pickled:
        message = (
            f"the weights of {compared.model.name} are available only as pickles, which can run "
            "code and whose tensors are not checked here; use a safetensors copy, or "
            "--lazy-unpickle"
        )
        yield compared.finding(message, WARNING)


@rule
def damaged_tokenizer(compared: Comparison) -> Findings:
    """Find a tokenizer whose files cannot be read."""
    found = compared.model.tokenizer
    if isinstance(found, ValueError):
        needed = compared.model is compared.donor or compared.with_tokenizer
        yield compared.finding(str(found), ERROR if needed else WARNING)


@rule
def leftover_quantization_config(compared: Comparison) -> Findings:
    """Find a quantization_config beside weights that are not quantized."""
    files = compared.model.files
    if (
        compared.model is compared.donor
        and files.tensors
        and files.quantized is None
        and files.config.get("quantization_config")
    ):
        yield compared.finding(
            f"config.json of {compared.model.name} has a quantization_config, but its weights are "
            "not quantized: the merged model inherits it and cannot be loaded; remove it from "
            "config.json"
        )


@rule
def different_architecture(compared: Comparison) -> Findings:
    """Find a model whose architecture, as mergekit describes it, is not that of the others."""
    model, donor = compared.model, compared.donor
    if _have_one_architecture(model, donor):
        return
    kinds = [
        cut(f"{', '.join(map(str, _architectures(m)))} ({m.settings.get('model_type')})")
        for m in (model, donor)
    ]
    message = (
        f"the architecture of {model.name} is {kinds[0]}, but that of {donor.name} is {kinds[1]}: "
        "mergekit refuses to mix architectures without --allow-crimes; merge models that were "
        f"fine-tuned from {donor.name}"
    )
    yield compared.finding(message)


def _have_one_architecture(model: ModelDescription, donor: ModelDescription) -> bool:
    if model.settings.get("model_type") != donor.settings.get("model_type"):
        return False
    try:
        ours, theirs = (arch_info_for_config(m.config) for m in (model, donor))
    except Exception:
        return True
    return ours is None or theirs is None or ours == theirs


def _architectures(model: ModelDescription) -> list[Any]:
    found = model.settings.get("architectures")
    return found if isinstance(found, list) and found else ["unnamed"]


# What each setting counts, under the names that several families of models use.
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


@rule
def different_size(compared: Comparison) -> Findings:
    """Find a model whose size differs from that of the model that it is merged into."""
    model, donor = compared.model, compared.donor
    numbers = COUNTS | SIZES | (LAYERS if compared.with_layers else {})
    differences = []
    for key, noun in numbers.items():
        ours, theirs = model.settings.get(key), donor.settings.get(key)
        if isinstance(ours, int) and isinstance(theirs, int) and ours != theirs:
            what = f"{noun} {ours}" if key in SIZES else f"{ours} {noun}"
            differences.append(f"{what} (not {theirs})")
    if differences:
        message = (
            f"{model.name} has {', '.join(dict.fromkeys(differences))}, so it was not fine-tuned "
            f"from {donor.name}, and their tensors cannot be merged"
        )
        yield compared.finding(message)


# What a model's weights run with in the merged model, instead of what they were trained with.
MEANINGS = {
    "rope_theta": "a position encoding",
    "rope_scaling": "a position encoding",
    "partial_rotary_factor": "a position encoding",
    "sliding_window": "an attention window",
    "rms_norm_eps": "a normalization",
    "layer_norm_eps": "a normalization",
    "layer_norm_epsilon": "a normalization",
    "hidden_act": "an activation function",
    "hidden_activation": "an activation function",
    "activation_function": "an activation function",
    "max_position_embeddings": "a maximum text length",
    "n_positions": "a maximum text length",
}


@rule
def different_setting(compared: Comparison) -> Findings:
    """Find a setting that differs between models and changes what the same weights do."""
    model, donor = compared.model, compared.donor
    for key, meaning in MEANINGS.items():
        ours, theirs = model.settings.get(key), donor.settings.get(key)
        if ours != theirs:
            message = (
                f"{key} is {shown(ours)} in {model.name} but {shown(theirs)} in {donor.name}, "
                "whose settings the merged model inherits: the weights of "
                f"{model.name} would run with {meaning} that they were not trained with; in the "
                f"merged config.json, set {key} to the value of the model that matters most"
            )
            yield compared.finding(message, WARNING)


@rule
def different_tied_embeddings(compared: Comparison) -> Findings:
    """Find models that disagree on whether the embeddings are tied to the lm_head."""
    model, donor = compared.model, compared.donor
    ours, theirs = (bool(m.settings.get("tie_word_embeddings")) for m in (model, donor))
    if ours != theirs:
        effect = "is left out" if theirs else "is a copy of its embeddings"
        message = (
            f"tie_word_embeddings is {ours} in {model.name} but {theirs} in {donor.name}, whose "
            f"settings the merged model inherits: the lm_head of {model.name} {effect}"
        )
        yield compared.finding(message, WARNING)


def _tokens(compared: Comparison) -> tuple[dict[str, int], dict[str, int]] | None:
    """Return the tokens of a model and of the donor; ``None`` if they need not be compared."""
    ours, theirs = compared.model.vocabulary, compared.donor.vocabulary
    if compared.with_tokenizer or ours is None or theirs is None:
        return None
    return (ours.ids, theirs.ids) if ours.ids and theirs.ids else None


@rule
def moved_tokens(compared: Comparison) -> Findings:
    """Find tokens whose ids differ from those in the merged model's tokenizer."""
    if (found := _tokens(compared)) is None:
        return
    ours, theirs = found
    shared = ours.keys() & theirs.keys()
    moved = [token for token in ours if token in shared and ours[token] != theirs[token]]
    if moved:
        examples = [f"{t!r}: {ours[t]} and {theirs[t]}" for t in moved]
        many = len(moved) > MOST_MOVED * len(shared)
        message = (
            f"{_number(moved)} of {compared.model.name} {_have(moved)} different ids in "
            f"{compared.donor.name} ({_examples(examples)}): the embeddings of different tokens "
            "would be merged; set tokenizer_source: base, or union"
        )
        yield compared.finding(message, ERROR if many else WARNING)


@rule
def unknown_tokens(compared: Comparison) -> Findings:
    """Find tokens that only one of the two models has."""
    if (found := _tokens(compared)) is None:
        return
    model, donor = compared.model, compared.donor
    ours, theirs = found
    here = [token for token in ours if token not in theirs]
    there = [token for token in theirs if token not in ours]
    if here:
        message = (
            f"{_number(here)} of {model.name} ({_examples(map(repr, here))}) {are(here)} unknown "
            f"to {donor.name}, whose tokenizer the merged model inherits; set tokenizer_source: "
            f"union, or {model.name}"
        )
        yield compared.finding(message, WARNING)
    elif there:
        message = (
            f"{_number(there)} of {donor.name} ({_examples(map(repr, there))}) {are(there)} not "
            f"in {model.name}, so whatever is in their rows is merged; set tokenizer_source: base"
        )
        yield compared.finding(message, WARNING)


@rule
def tokens_left_out(compared: Comparison) -> Findings:
    """Find tokens of a model that the tokenizer which the config chooses does not have."""
    chosen = compared.tokenizer_of
    ours, theirs = compared.model.vocabulary, None if chosen is None else chosen.vocabulary
    if chosen is None or ours is None or theirs is None or not theirs.ids:
        return
    left = [token for token in ours.ids if token not in theirs.ids]
    if left:
        message = (
            f"{_number(left)} of {compared.model.name} ({_examples(map(repr, left))}) "
            f"{are(left)} not in the tokenizer of {chosen.name}, which tokenizer_source chooses; "
            "tokenizer_source: union keeps them"
        )
        yield compared.finding(message, Severity.HINT)


_SPECIAL_EFFECTS = {
    "bos_token": "texts may begin with a token that it was not trained with",
    "eos_token": "it may not stop where it should",
    "pad_token": "padded batches may differ",
}


@rule
def different_special_token(compared: Comparison) -> Findings:
    """Find a first, last or padding token that differs between models."""
    if compared.with_tokenizer:
        return
    model, donor = compared.model, compared.donor
    for key in tokenizer.SPECIAL:
        ours, theirs = _special(model, key), _special(donor, key)
        if ours is None or theirs is None:
            ours, theirs = (_special_id(m, key) for m in (model, donor))
        if ours is not None and theirs is not None and ours != theirs:
            message = (
                f"{key} is {cut(ours)} in {model.name} but {cut(theirs)} in {donor.name}, whose "
                f"tokenizer the merged model inherits: {_SPECIAL_EFFECTS[key]}; set "
                f"tokenizer_source: {model.name} if the merged model is to be used like "
                f"{model.name}"
            )
            yield compared.finding(message, WARNING)


def _special(model: ModelDescription, key: str) -> str | None:
    token = None if model.vocabulary is None else model.vocabulary.special.get(key)
    return None if token is None else repr(token)


def _special_id(model: ModelDescription, key: str) -> str | None:
    number = model.settings.get(f"{key}_id")
    return None if number is None else f"id {number}"


@rule
def lost_chat_template(compared: Comparison) -> Findings:
    """Find a chat template that the merged model will not have."""
    model, giver = compared.model, compared.template_of
    if giver is None or giver is model or model.vocabulary is None:
        return
    ours = model.vocabulary.template
    theirs = None if giver.vocabulary is None else giver.vocabulary.template
    if ours is None or (theirs is not None and ours.strip() == theirs.strip()):
        return
    other = "has none" if theirs is None else "has a different one"
    message = (
        f"{model.name} has a chat template, but {giver.name}, whose tokenizer the merged model "
        f"inherits, {other}: the merged model will not be prompted as {model.name} was trained; "
        "set chat_template: auto"
    )
    yield compared.finding(message, WARNING)


ALONE = (
    pickled_weights,
    damaged_tokenizer,
    leftover_quantization_config,
)  # on every model, including the donor
OF_ONE_ARCHITECTURE = (
    different_size,
    different_setting,
    different_tied_embeddings,
    moved_tokens,
    unknown_tokens,
    tokens_left_out,
    different_special_token,
    lost_chat_template,
)
RULES = (*ALONE, different_architecture, *OF_ONE_ARCHITECTURE)


def helpful_settings(comparisons: Iterable[Comparison]) -> dict[str, str]:
    """Return the config settings that handle differences between tokenizers, with the reason."""
    others = [compared for compared in comparisons if compared.model is not compared.donor]
    found = {}
    if any(list(moved_tokens(c)) + list(unknown_tokens(c)) for c in others):
        found["tokenizer_source"] = "the models' tokens differ"
    if any(list(lost_chat_template(compared)) for compared in others):
        found["chat_template"] = "the models' chat templates differ"
    return found


def _number(tokens: list[str]) -> str:
    return "1 token" if len(tokens) == 1 else f"{len(tokens):,} tokens"


def _have(tokens: list[str]) -> str:
    return "has" if len(tokens) == 1 else "have"


def _examples(texts: Iterable[str]) -> str:
    found = [cut(text) for text, _ in zip(texts, range(EXAMPLES + 1), strict=False)]
    return ", ".join(found[:EXAMPLES]) + (", ..." if len(found) > EXAMPLES else "")
