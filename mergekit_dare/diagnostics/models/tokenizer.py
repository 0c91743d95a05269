"""A model's tokens, special tokens and chat template, as its tokenizer's files have them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_dare.diagnostics.models.files import ModelFiles, read_json

# Where a tokenizer's tokens are: in the first of these that exists.
TOKENS = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
FILES = (
    *TOKENS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
SPECIAL = ("bos_token", "eos_token", "pad_token")


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer contains.

    Attributes:
        ids: Every token's id, including those of added tokens.
        special: The text of its first, last and padding token, by the names in ``SPECIAL``.
        template: Its chat template, if it has one.

    """

    ids: dict[str, int] = field(default_factory=dict)
    special: dict[str, str] = field(default_factory=dict)
    template: str | None = None


def source_of(config: MergeConfiguration) -> ModelReference | str | None:
    """Return the tokenizer that a config chooses: a model's, ``base``, ``union``, or none."""
    return config.tokenizer.source if config.tokenizer else config.tokenizer_source


def read(files: ModelFiles) -> Vocabulary | None:
    """Return what a model's tokenizer contains; ``None`` if it has none.

    Raises:
        ValueError: a file is damaged; the message names it.

    """
    paths = {name: path for name in FILES if (path := files.json_file(name)) is not None}
    if not paths:
        return None
    settings = _mapping(paths.get("tokenizer_config.json"))
    special = _mapping(paths.get("special_tokens_map.json"))
    texts = {key: _text(settings.get(key)) or _text(special.get(key)) for key in SPECIAL}
    return Vocabulary(
        _tokens(paths),
        {key: text for key, text in texts.items() if text is not None},
        _template(paths, settings),
    )


def _mapping(path: Path | None) -> dict[str, Any]:
    content = None if path is None else read_json(path)
    return content if isinstance(content, dict) else {}


def _text(token: object) -> str | None:
    """Return a token that is given as a string, or as a mapping with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _tokens(paths: dict[str, Path]) -> dict[str, int]:
    name = next((name for name in TOKENS if name in paths), None)
    found: dict[str, int] = {}
    if name == "tokenizer.json":
        found = _of_tokenizers(_mapping(paths[name]))
    elif name == "vocab.json":
        found = _ids(_mapping(paths[name]))
    elif name == "vocab.txt":
        try:
            lines = paths[name].read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ValueError(f"{paths[name]} cannot be read: {error}") from error
        found = {line: number for number, line in enumerate(lines)}
    elif name is not None:
        found = _of_sentencepiece(paths[name].parent)
    return found | _ids(_mapping(paths.get("added_tokens.json")))


def _of_tokenizers(content: dict[str, Any]) -> dict[str, int]:
    """Read the format of the tokenizers library: pairs with scores for a unigram model."""
    model = content.get("model")
    tokens = model.get("vocab") if isinstance(model, dict) else None
    found: dict[str, int] = {}
    if isinstance(tokens, dict):
        found = _ids(tokens)
    elif isinstance(tokens, list):
        found = {str(p[0]): n for n, p in enumerate(tokens) if isinstance(p, list) and p}
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            found |= _ids({token["content"]: token.get("id")})
    return found


def _of_sentencepiece(folder: Path) -> dict[str, int]:
    """Let transformers read it; without the packages that this may need, nothing is known."""
    from transformers import AutoTokenizer

    try:
        tokens: dict[str, int] = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        ).get_vocab()
    except Exception:
        return {}
    return tokens


def _ids(tokens: dict[str, Any]) -> dict[str, int]:
    return {token: number for token, number in tokens.items() if isinstance(number, int)}


def _template(paths: dict[str, Path], settings: dict[str, Any]) -> str | None:
    if (path := paths.get("chat_template.jinja")) is not None:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    found = _mapping(paths.get("chat_template.json")).get("chat_template")
    found = found or settings.get("chat_template")
    if isinstance(found, list):  # several named ones
        named = {str(t.get("name")): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default") or json.dumps(named, sort_keys=True)
    return found if isinstance(found, str) and found.strip() else None
