"""Which tokenizer and chat template a merged model takes, as they are."""

from __future__ import annotations

import json
from pathlib import Path

from mergekit.common import ModelReference

from mergekit_dare.diagnostics.examination import Examination
from mergekit_dare.diagnostics.models import tokenizer
from mergekit_dare.diagnostics.models.files import read_json
from mergekit_dare.diagnostics.plan.by_name import NotByNameError

FURTHER_TEMPLATES = "additional_chat_templates"  # a folder
_FILES = (*tokenizer.FILES, "merges.txt", "sentencepiece.bpe.model")


def is_of_tokenizer(name: str) -> bool:
    """Tell whether a file is a tokenizer's."""
    return name in _FILES or name.startswith(f"{FURTHER_TEMPLATES}/")


def source_of(examination: Examination, donor: ModelReference) -> ModelReference:
    """Return the model whose tokenizer the output takes.

    Raises:
        NotByNameError: rows of the embeddings would have to be moved, or there is no tokenizer.

    """
    config = examination.config
    source = tokenizer.source_of(config)
    if source is None:
        return donor
    needs = "which tensors have rows of tokens is not told by names; merge with mergekit-yaml"
    if source == "union":
        raise NotByNameError(f"a union of tokenizers brings rows into another order: {needs}")
    if config.tokenizer and (config.tokenizer.tokens or config.tokenizer.pad_to_multiple_of):
        raise NotByNameError(f"tokens and pad_to_multiple_of of tokenizer change rows: {needs}")
    chosen = source if isinstance(source, ModelReference) else donor
    known = examination.models[chosen].vocabulary
    if known is None:
        raise NotByNameError(f"the tokenizer is to be that of {chosen}, which has none")
    for model in config.referenced_models():
        other = examination.models[model].vocabulary
        if other is not None and other.ids != known.ids:
            raise NotByNameError(f"{model} has other tokens than {chosen}: {needs}")
    return chosen


def write_chat_template(folder: Path, template: str) -> None:
    """Give a tokenizer's folder this chat template in place of its own."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else None
    if isinstance(settings, dict) and settings.pop("chat_template", None) is not None:
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
